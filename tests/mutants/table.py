"""What is broken on purpose, where, and which tests must notice.

`old` is once in the file, and as short as that allows: so that renaming seldom touches it. Each of these was
a plausible slip, or was tried when the code was written.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]  # pytest's arguments


def tests(file: str, *selected: str) -> tuple[str, ...]:
    return (f"tests/{file}.py", *(("-k", " ".join(selected)) if selected else ()))


CPU_BITS = tests("test_same_bits", "(lion or tiger-accumulate) and (bf16-bf16-bf16 or ordinary)")
CUDA_BITS = tests("test_cuda_bits", "(lion or tiger-accumulate) and not alignment")
CPU_SUMS = tests(
    "test_reducing", "float64 and ((lamb or adafactor-torch) and not tiles or amos-rows and not momentum)"
)
CUDA_SUMS = tests(
    "test_cuda_reducing", "(float64 or traffic) and (lamb or adafactor-torch or amos-rows) and not momentum"
)
CUDA_NORM = tests("test_cuda_norm")
NORM = tests("test_gradient_scale", "the_norm or only_gradients")
LAZY = tests("test_lazy", "(which_rows or params_mode or twice or rows_of_zeros) and (lion or twice)")
LAMB = tests("test_lamb", "ratio or decay or relative")
PLAN = tests("test_plan_changes", "lion and (late or state_ or replaced)")
TIGER = tests("test_checkpoints", "tiger-accumulate and goes_on and fp32")
SHARED = tests("test_shared_memory", "not lazy and not (adam or amos or adafactor)")
LOADING = tests("test_loading")
FORMATS = tests("test_formats", "cpu or cuda or reference")
ACCUMULATION = tests("test_gradient_accumulation", "resumed or small or cycle")
EMA = tests("test_ema")
LOOKAHEAD = tests("test_lookahead")
SHARDED = tests("test_sharded_checkpoints")
NORMS = tests("test_sharded_steps", "norms_go")
SUMMANDS = tests("test_summands")
AGREEMENT = tests("test_agreement", "wrong_on_one_rank and reference")
CUDA_ROUNDS = tests("test_rounds", "cuda and (adafactor-torch or tiger-rows or lamb)")
CUDA_STOPS = tests("test_rounds", "sums_of_parts or sums_in_one_order or (stands_at_a_stop and not columns)")
SCHEDULE = tests("test_schedule")
PTX = tests("test_machine_code_ptx", "triton and (lion-f32 or adamw-f32-f32-f32) and reference")
INTERPRETED = tests("interpreted/test_triton_bits", "lion and same_bits and f32-f32-f32")
INTERPRETED_SUMS = tests("interpreted/test_triton_reducing", "float64 and (lamb or adafactor-root-momentum)")
GPU_PLAN = tests("test_gpu_plan", "not emulator and not one_wrong_bit")
TRAIN = tests("test_train", "held_out or repeated or schedule")
BENCH = tests("test_bench", "quartiles or fresh or touch")

MUTANTS = [
    # the CPU's engine
    Mutant("cpu-last-item", "csrc/cpu/step.h", "    if (filled > 0) items_", "    if (filled < 0) items_", CPU_BITS),
    Mutant("cpu-items-skipped", "csrc/cpu/threads.h", "fetch_add(1,", "fetch_add(2,", CPU_BITS),
    Mutant("cpu-absent-in-norm", "csrc/cpu/step.h", "t.coefficients >= 0 && !lists(", "!lists(", NORM),
    Mutant("cpu-norm-tail", "csrc/cpu/sum_squares.h", "= streams * part; i < n;", "= streams * part; i + 1 < n;", NORM),
    Mutant("cpu-minus-zero", "csrc/cpu/any_nonzero.h", "return bits << 1 != 0;", "return bits != 0;", LAZY),
    Mutant("cpu-lazy-entries", "csrc/cpu/lazy_tensors.h", "for (int64_t which = 1;", "for (int64_t which = 2;", LAZY),
    Mutant("cpu-idle-rows", "csrc/cpu/lazy_tensors.h", "m.idle[store_params] = 0.f", "m.idle[0] = 0.f", LAZY),
    Mutant("cpu-store-short", "csrc/cpu/storage.h", "narrow(buffer_, storage_, at, first_ + at, n)", "narrow(buffer_, storage_, at, first_ + at, n - 1)", CPU_BITS),
    Mutant("cpu-params-in-cycle", "csrc/cpu/engine.h", "if (store_params) {", "if (uses.parameter) {", CPU_BITS),
    Mutant("cpu-lane-sum", "csrc/cpu/reduce/sums.h", "for (; i < n; i++) rest += x[i];", "for (; i + 1 < n; i++) rest += x[i];", CPU_SUMS),
    # the CUDA engine
    Mutant("cuda-alignment", "csrc/cuda/elements.cuh", "(0) % pack_bytes == 0;", "(0) % 4 == 0;", CUDA_BITS),
    Mutant("cuda-tail", "csrc/cuda/engine.cuh", "at < chunk.size; at", "at + 1 < chunk.size; at", CUDA_BITS),
    Mutant("cuda-params-in-cycle", "csrc/cuda/elements.cuh", "Outcome::none && store_params)", "Outcome::none)", CUDA_BITS),
    Mutant("cuda-found-inf", "csrc/cuda/engine.cuh", "*list.found_inf != 0.f) return;", "*list.found_inf == 7.f) return;", tests("test_capturable", "found_inf and not (adam or adax or amos or adafactor or lamb or layer or tiger)")),
    Mutant("cuda-last-chunk", "csrc/cuda/launch_list.h", "block + 1 < next ?", "block + 1 <= next ?", CUDA_BITS),
    Mutant("cuda-set-of-launch", "csrc/cuda/launch_list.h", "t.coefficients - first_set_", "t.coefficients", tests("test_cuda_launches", "own_rows or few_bytes")),
    Mutant("cuda-last-launch", "csrc/cuda/launches.h", "if (!packer.empty()) enqueue();", "if (packer.num_tensors() > 1) enqueue();", CUDA_BITS),
    Mutant("cuda-absent-in-norm", "csrc/cuda/launches.h", "t.coefficients < 0 || t.g.format != format", "t.g.format != format", CUDA_NORM),
    Mutant("cuda-norm-twice", "csrc/cuda/norm.cu", "first += together * stride", "first += stride", CUDA_NORM),
    Mutant("cuda-norm-enlarges", "csrc/cuda/norm.cu", "factor / max_norm, 1.0)", "factor / max_norm, 0.5)", CUDA_NORM),
    Mutant("cuda-barrier", "csrc/cuda/sums.cuh", "__syncthreads();", "", CUDA_NORM),
    Mutant("cuda-sum-of-rows", "csrc/cuda/reduce/reduce_gradient.cuh", "if (upper) rows.first += half;", "", CUDA_SUMS),
    Mutant("cuda-mean-of-rows", "csrc/cuda/reduce/update_factors.cuh", "sum / double(t.summed_columns)", "sum / double(t.rows)", CUDA_SUMS),
    Mutant("cuda-mean-of-matrix", "csrc/cuda/reduce/update_factors.cuh", "warp_size, 1)) / double(t.rows)", "warp_size, 1)) / double(t.columns)", CUDA_SUMS),
    Mutant("cuda-shards-mean-of-matrix", "csrc/cuda/reduce/update_factors.cuh", "if (t.summed_rows == t.rows) {", "if (true) {", CUDA_ROUNDS),
    Mutant("cuda-shards-size", "csrc/cuda/reduce/reduce_norms.cuh", "Rule::finalize(totals, t.summed_size,", "Rule::finalize(totals, t.size,", CUDA_ROUNDS),
    Mutant("cuda-shards-row-norms", "csrc/cuda/reduce/apply_by_row.cuh", "totals[j] = load(norms + j);", "totals[j] = 1;", CUDA_ROUNDS),
    Mutant("rounds-counts", "python/danlu/backends/stops.py", "counts[place] = sums.count", "pass", CUDA_ROUNDS),
    Mutant("rounds-stale-counts", "python/danlu/backends/reducing_rounds.py", "self.whole.copy_(self._host)", "pass", CUDA_ROUNDS),
    Mutant("rounds-stops-columns", "python/danlu/backends/reducing_rounds.py", "run_stride=first.row_tiles * columns", "run_stride=columns", CUDA_STOPS),
    Mutant("cuda-stops-next-turn", "csrc/cuda/sum_parts.cu", "w.place += w.wrapped;", "", CUDA_STOPS),
    Mutant("cuda-stops-barrier", "csrc/cuda/sum_parts.cu", "__syncthreads();", "", CUDA_STOPS),
    # rules
    Mutant("lion-beta", "csrc/rules/lion.h", "c = k.beta1 * m", "c = k.beta2 * m", CPU_BITS),
    Mutant("lamb-zero-update", "csrc/rules/lamb.h", "sums[0] > 0 && sums[1] > 0", "sums[0] > 0", LAMB),
    Mutant("lamb-clip", "csrc/rules/lamb.h", "ratio > k.max_ratio ? k.max_ratio : ratio", "ratio", LAMB),
    Mutant("adafactor-floor", "csrc/rules/adafactor.h", "larger(double(k.eps2),", "larger(0.0,", tests("test_reducing", "zero_parameters and adafactor")),
    Mutant("amos-decay", "csrc/rules/amos.h", "b = b + gamma * (1.f + b);", "b = b + gamma;", CPU_SUMS),
    Mutant("accumulate-fresh", "csrc/rules/accumulate.h", "k.fresh != 0.f ? term", "k.fresh > 1.f ? term", ACCUMULATION),
    Mutant("fp16-infinity", "csrc/common/types.h", "magnitude >= 0x477ff000u", "magnitude > 0x477ff000u", tests("test_storage", "nearest")),
    # storage formats
    Mutant("format-place-cpu", "csrc/cpu/conversions.h", "encode<F>(index + i,", "encode<F>(index,", FORMATS),
    Mutant("format-place-cuda", "csrc/cuda/formats.cuh", "encode_all(first + at,", "encode_all(at,", FORMATS),
    Mutant("format-place-of-rows", "csrc/cuda/engine.cuh", "if constexpr (F::indexed)", "if constexpr (false)", FORMATS),
    Mutant("format-alignment", "csrc/cuda/elements.cuh", "if constexpr (is_used<value>) bits", "if constexpr (is_used<value> && array == 0) bits", FORMATS),
    Mutant("format-further-row", "csrc/cuda/reduce/elements.cuh", "row_of_coefficients<Rule> + 1>", "row_of_coefficients<Rule> + 2>", FORMATS),
    Mutant("format-lacks-array", "python/danlu/describe.py", "elif its.value and any(", "elif not its.value and any(", FORMATS),
    Mutant("format-converted", "python/danlu/checkpoint.py", "held = _converted(name, p, kept, held)", "pass", FORMATS),
    # the native list of parameters
    Mutant("list-replaced-state", "csrc/host/step_list.h", "if (value != r.state) return false;", "", PLAN),
    Mutant("list-replaced-state-of-a-part", "csrc/host/step_list.h", "if (held != r.state) return false;", "", tests("test_parts", "goes_with_its_own")),
    Mutant("list-other-tensor", "csrc/host/step_list.h", "if (tensor != state_tensors_[j].tensor) return false;", "", PLAN),
    Mutant("list-states-not-held", "csrc/host/step_list.h", "Py_INCREF(tensor);\n      hold(tensor);\n", "", tests("test_threads", "replaced_while and cpu")),
    Mutant("list-states-held-late", "csrc/host/step_list.h", "if (!hold_states(r) || !(reads(r, t, g) || copies(r, t, i, copy_gradient)) || !addresses(r, t, g)) {", "if (!(reads(r, t, g) || copies(r, t, i, copy_gradient)) || !hold_states(r) || !addresses(r, t, g)) {", tests("test_threads", "replaced_while and cpu")),
    Mutant("list-cycle", "csrc/host/step_list.h", "micro_step + 1.f < float(r.accumulation_steps)", "micro_step < float(r.accumulation_steps)", TIGER),
    Mutant("list-moved-together", "csrc/host/step_list.h", "if (share_memory()) {", "if (false) {", SHARED),
    Mutant("list-negated", "csrc/host/tensor_view.h", "|| !negated(tensor))", "|| true)", tests("test_plan_changes", "negated and lion")),
    # host code in Python
    Mutant("plan-late-gradient", "python/danlu/plan.py", "any(p.grad is not None for p in self._waiting)", "False", PLAN),
    Mutant("plan-left-alone", "python/danlu/plan.py", "if any(_look(p) != look for p, look in self._left_alone):", "if False:", tests("test_left_alone", "gets_a_gradient or later")),
    Mutant("plan-turns", "python/danlu/plan.py", "key=lambda item: item[0][0]", "key=lambda item: -item[0][0]", SHARED),
    Mutant("plan-found-inf", "python/danlu/plan.py", "and scaling.skips():", "and False:", tests("test_gradient_scale", "found_inf and (lion or capturable)")),
    Mutant("checkpoint-other-optimizer", "python/danlu/checkpoint.py", "if lacking and foreign:", "if False:", LOADING),
    Mutant("checkpoint-count", "python/danlu/checkpoint.py", "number >= 0 and math.isfinite(number)", "number >= 0", LOADING),
    Mutant("checkpoint-lacking", "python/danlu/checkpoint.py", "    if lacking:", "    if False:", LOADING),
    Mutant("checkpoint-dtype", "python/danlu/checkpoint.py", "(device=p.device, dtype=dtype)", "(device=p.device)", tests("test_checkpoints", "declared and lion")),
    Mutant("scale-enlarges", "python/danlu/scale.py", "scalar.maximum(1.0, excess)", "excess", tests("test_gradient_scale", "max_grad_norm and lion")),
    Mutant("shared-turns", "python/danlu/shared_memory.py", "turn + 1 - (", "turn + 0 * (", SHARED),
    Mutant("lazy-order-of-entries", "python/danlu/listed_rows.py", "rows.sort(stable=True)", "rows.sort(descending=True)", LAZY),
    Mutant("schedule-last-tile", "python/danlu/schedule.py", "_divided_up(rows, tile_rows), _divided_up(columns", "rows // tile_rows, _divided_up(columns", SCHEDULE),
    Mutant("request-by-name-alone", "python/danlu/callers.py", ' and _is_known(frame.f_globals.get("__name__"))', "", tests("test_state_request")),
    # wrappers
    Mutant("accumulation-flush", "python/danlu/wrappers/gradient_accumulation.py", "self._pass.scale(self.steps / self.position)", "self._pass.scale(1.0)", ACCUMULATION),
    Mutant("accumulation-resumed", "python/danlu/wrappers/gradient_accumulation.py", "(steps / max(self.steps, position))", "(steps / self.steps)", ACCUMULATION),
    Mutant("ema-resumed", "python/danlu/wrappers/ema.py", "if before != self.decay:", "if False:", EMA),
    Mutant("ema-weight", "python/danlu/wrappers/ema.py", "(1 - math.pow(decay, step))", "1", EMA),
    Mutant("lookahead-stale", "python/danlu/wrappers/lookahead.py", 'self.state[p]["step"].item() == 0:', "False:", LOOKAHEAD),
    # Triton
    Mutant("triton-alignment", "triton_kernels/engine.py", "bits % 16 == 0", "bits % 4 == 0", PTX),
    Mutant("triton-tail", "triton_kernels/engine.py", "offsets < left, factor", "offsets <= left, factor", PTX),
    Mutant("triton-whole-tail", "triton_kernels/engine.py", "for at in range(full, left, BLOCK)", "for at in range(full, left - 1, BLOCK)", INTERPRETED),
    Mutant("triton-mean-of-rows", "triton_kernels/reduce/update_factors.py", "mean = total / tl.load(geometry + SUMMED_COLUMNS)", "mean = total / tl.load(geometry + ROWS)", INTERPRETED_SUMS),
    Mutant("triton-mask-of-sums", "triton_kernels/reduce/reduce_norms.py", "tl.where(mask, terms[0], 0.0)", "tl.where(mask, 0.0, 0.0)", tests("test_machine_code_ptx", "triton and float64 and (lamb or tiger-matrix)")),
    Mutant("triton-tile-below", "triton_kernels/reduce/reduce_gradient.py", "COLUMN_SUMS) + line * columns", "COLUMN_SUMS) + matrix * columns", tests("interpreted/test_triton_reducing", "float64 and amos")),
    Mutant("triton-stops-next-turn", "triton_kernels/reduce/sum_parts.py", "beyond = at >= length", "beyond = at > length", tests("interpreted/test_triton_rounds", "sums_of_parts")),
    # ranks
    Mutant("ranks-one-group", "python/danlu/exchange.py", "for group in groups_in_order(requests):", "for group in groups_in_order(requests)[:1]:", SHARDED),
    Mutant("ranks-own-count", "python/danlu/layout.py", "sums.count = one.size", "sums.count = sums.count", SHARDED),
    Mutant("ranks-placement-of-sums", "python/danlu/layout.py", "Exchanged(groups_of(param, one.dims)", "Exchanged(groups_of(param, one.dims[:1])", SHARDED),
    Mutant("ranks-part-of-a-whole", "python/danlu/sharding.py", 'type(placements[k]).__name__ == "_StridedShard"', "0", SHARDED),
    Mutant("ranks-another-gradient", "python/danlu/agreement.py", "return Verdict(failed != 0, found_inf != 0, ranks * squares == h * h)", "return Verdict(failed != 0, found_inf != 0, True)", AGREEMENT),
    Mutant("ranks-found-inf", "python/danlu/agreement.py", "return Verdict(failed != 0, found_inf != 0, ranks", "return Verdict(failed != 0, False, ranks", tests("test_agreement", "infinities")),
    Mutant("ranks-written-early", "python/danlu/backends/reference.py", "running = self._steps(copies=True)", "running = self._steps(copies=False)", AGREEMENT),
    Mutant("ranks-rows-of-one", "python/danlu/sharded_step.py", "    exchange(flags)\n", "", tests("test_sharded_steps", "rows_of_shards")),
    Mutant("ranks-unclipped-sums", "python/danlu/layout.py", "factor**one.power)", "factor)", NORMS),
    Mutant("ranks-clipped-averages", "python/danlu/optimizers/adafactor.py", "kept_out=(second,), power=0)", "kept_out=(second,), power=2)", NORMS),
    Mutant("ranks-unclipped-reference", "python/danlu/backends/reference.py", "torch.mul(g, sign * factor, out=scaled)", "pass", NORMS),
    Mutant("ranks-unclipped-cpu", "csrc/host/bindings_cpu.cpp", "  void reduce_norms(const py::list& coefficients, int threads) {\n    read_coefficients(coefficients, stride_, coefficients_);\n", "  void reduce_norms(const py::list& coefficients, int threads) {\n", NORMS),
    Mutant("ranks-large-norm", "python/danlu/sharded_step.py", "return not norm < LARGEST", "return False", NORMS),
    Mutant("ranks-summand-lost", "python/danlu/summands.py", "                p.grad = g\n", "                pass\n", SUMMANDS),
    Mutant("ranks-unknown-summand", "python/danlu/summands.py", "        if seen:\n", "        if True:\n", SUMMANDS),
    Mutant("ranks-summand-misplaced", "python/danlu/summands.py", "if sharded_dim(wanted) is not None or getattr", "if getattr", SUMMANDS),
    Mutant("ranks-gradient-misplaced", "python/danlu/plan.py", "p.grad is not None and placements(p.grad) != own", "False", SUMMANDS),
    Mutant("ranks-told-by-groups", "python/danlu/summands.py", "(*groups, *self._groups)", "(*groups,)", SUMMANDS),
    Mutant("ranks-empty-shards", "python/danlu/layout.py", "self.exchanging = [member for member in self.members if member.exchanges]", "self.exchanging = [m for m in self.members if m.exchanges and local(m.param).numel()]", NORMS),
    Mutant("ranks-other-order", "python/danlu/exchange.py", "values = [member.values.view(-1) for member in members]", "values = sorted((member.values.view(-1) for member in members), key=lambda x: x.data_ptr())", NORMS),
    Mutant("ranks-host-refused", "python/danlu/sharded_step.py", "if self._layout.waits or not any(", "if True or not any(", SUMMANDS),
    # benches
    Mutant("bench-quartiles", "bench/harness.py", "inclusive", "exclusive", BENCH),
    Mutant("bench-wrong-bits", "bench/gpu_plan.py", "return len(faults(stages)) == len(ENGINES)", "return bool(faults(stages))", GPU_PLAN),
    Mutant("bench-time-left", "bench/gpu_plan.py", "if left < stage.least:", "if left < 0:", GPU_PLAN),
    Mutant("bench-held-out", "bench/text.py", "hashlib.sha256(name.encode())", "hashlib.sha256(b'')", TRAIN),
    Mutant("bench-batches", "bench/text.py", 'self.generator.set_state(state["generator"])', "pass", TRAIN),
    Mutant("bench-columns", "bench/exchanges.py", "Shard(int(by_columns))", "Shard(0)", tests("test_sharded_bench", "parallelism")),
    Mutant("bench-hops", "bench/network.py", "call + 2 * ((on_node - 1)", "call + ((on_node - 1)", tests("test_sharded_bench", "times")),
    Mutant("bench-own-windows", "bench/fsdp.py", "[dist.get_rank()]", "[0]", tests("test_train_fsdp", "losses")),
]  # fmt: skip
