"""Builds danlu's native modules with CMake. They need neither torch nor its headers."""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
# cmake and ninja may be installed beside the interpreter only, without its environment being activated
TOOLS = {**os.environ, "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])}


class CMakeBuild(build_ext):
    """Configures and builds the CMake project, and leaves the modules where setuptools wants them."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name != MODULES[0].name:
            return  # one run builds all
        import pybind11

        root = Path(__file__).resolve().parent
        build = root / "build" / f"native-{sys.implementation.cache_tag}"  # is kept: the next run builds less
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        generator = ["-G", "Ninja"] if shutil.which("ninja", path=TOOLS["PATH"]) else []
        configure = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            *(
                f"-D{name}={os.environ[name]}" if name in os.environ else f"-U{name}"
                for name in ("DANLU_CUDA", "DANLU_CUDA_ARCHS", "DANLU_CUDA_COMBINATIONS", "DANLU_QUICK")
            ),
        ]
        subprocess.run(["cmake", "-S", root, "-B", build, *generator, *configure], check=True, env=TOOLS)
        subprocess.run(["cmake", "--build", build, "--parallel"], check=True, env=TOOLS)


# CMake decides whether there is a CUDA module
MODULES = [Extension("danlu._cpu", sources=[]), Extension("danlu._cuda", sources=[], optional=True)]

if not NATIVE:
    print("danlu: no native CPU kernels for this platform; the torch reference will serve", file=sys.stderr)

setup(
    ext_modules=MODULES if NATIVE else [],
    cmdclass={"build_ext": CMakeBuild},
)
