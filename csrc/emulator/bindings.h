// What tests ask of the emulator, as functions of the emulated module.
#pragma once
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "emulator.h"
#include "kernels.h"

namespace danlu {

inline void bind_emulator(pybind11::module_& m) {
  namespace py = pybind11;
  using emulator::Call;
  using emulator::Launch;
  using emulator::Machine;
  py::class_<Launch>(m, "Launch", py::module_local())
      .def_readonly("blocks", &Launch::blocks)
      .def_readonly("threads", &Launch::threads)
      .def_readonly("parameter_bytes", &Launch::parameter_bytes)
      .def_readonly("stream", &Launch::stream)
      .def_readonly("device", &Launch::device)
      .def_readonly("early", &Launch::early);
  const auto sizes = [](const dim3& d) { return std::array<unsigned, 3>{d.x, d.y, d.z}; };
  py::class_<Call>(m, "Call", py::module_local())
      .def_readonly("place", &Call::place)
      .def_property_readonly("grid", [sizes](const Call& call) { return sizes(call.grid); })
      .def_property_readonly("block", [sizes](const Call& call) { return sizes(call.block); })
      .def_property_readonly("parameters", [](const Call& call) { return py::bytes(call.parameters); })
      .def_readonly("stream", &Call::stream);
  py::class_<Machine>(m, "Machine", py::module_local())
      .def_readwrite("device_count", &Machine::device_count)
      .def_readwrite("device", &Machine::device)
      .def_readwrite("driver_version", &Machine::driver_version)
      .def_readwrite("capability", &Machine::capability)
      .def_readwrite("fail_launch", &Machine::fail_launch)
      .def_readwrite("first_block", &Machine::first_block)
      .def_readwrite("end_block", &Machine::end_block)
      .def_readwrite("backwards", &Machine::backwards)
      .def_readwrite("overlaps", &Machine::overlaps)
      .def_readwrite("executor", &Machine::executor)
      .def_readonly("launches", &Machine::launches)
      .def_property_readonly("bytes_read", [](const Machine& m) { return m.read.bytes; })
      .def_property_readonly("bytes_written", [](const Machine& m) { return m.written.bytes; })
      .def("count_traffic", [](Machine& m) { m.read.counts = m.written.counts = true; });
  m.def("machine", &emulator::machine, py::return_value_policy::reference);
  m.def("reset", [] { emulator::machine() = Machine(); }, "A machine as new.");
  m.def("finish", &emulator::finish, "Runs the launches that have started and are not waited for.");
  m.def("overlapping", &emulator::overlapping,
        "What a launch reads that starts early, before and after it waits.");
  m.def("impatient", &emulator::impatient, "A launch that starts early and does not wait: an error.");
  m.def("block_sums", &emulator::block_sums, "Sums of a block's numbers by shuffles and shared memory.");
  m.def("transposed", &emulator::transposed, "A square matrix through shared memory, 2-D threads.");
  m.def("torn_barrier", &emulator::torn_barrier, "A barrier that half the threads skip: an error.");
  m.def("torn_shuffle", &emulator::torn_shuffle, "Halves of a warp in different shuffles: an error.");
  m.def("misaligned", &emulator::misaligned, "A 16-byte access one value off: an error.");
}

}  // namespace danlu
