"""Builds the native backend's kernels; everything else stands in pyproject.toml.

Without a C++ compiler the package installs all the same, in pure Python, and one line says what is missing.
"""

import os
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("src/maestrale/native_backend/csrc")
WITHOUT = "maestrale: installed without the native backend's kernels: {}; remedy: {}, or the extra maestrale[torch]"


class BuildKernels(build_ext):
    def build_extensions(self) -> None:
        compile_one_by_one = self.compiler.compile

        def compile_together(sources, **options):  # a compiler a core: instruction sets are files of their own
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_one_by_one([source], **options), sources)
                return [one for (one,) in objects]

        if self.compiler.compiler_type == "unix":
            self.compiler.compile = compile_together
        super().build_extensions()
        for extension in self.extensions:
            if not Path(self.get_ext_fullpath(extension.name)).exists():
                reason = "no C++20 compiler that works"
                print(WITHOUT.format(reason, "install g++ 11 or later and install again"), file=sys.stderr)


def kernels() -> list[Extension]:
    try:
        import nanobind
    except ImportError:
        print(WITHOUT.format("nanobind is missing", "pip install nanobind and install again"), file=sys.stderr)
        return []
    stable = sys.version_info >= (3, 12) and not sysconfig.get_config_var("Py_GIL_DISABLED")
    binding = Path(nanobind.source_dir())
    return [
        Extension(
            "maestrale.native_backend._native",
            sources=sorted(map(str, SOURCES.glob("*.cpp"))),
            depends=sorted(str(path) for ending in ("*.h", "*.inl") for path in SOURCES.glob(ending)),
            include_dirs=[nanobind.include_dir(), str(binding), str(binding.parent / "ext/robin_map/include")],
            define_macros=[("NDEBUG", "1"), *([("Py_LIMITED_API", "0x030C0000")] if stable else [])],
            # no fused multiply-add but where the kernels say so: the same bits from every compiler
            extra_compile_args=[  # the last two: GCC 12 warns of its own headers
                *("-std=c++20", "-O3", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"),
                *("-fno-strict-aliasing", "-g0", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
            ],
            py_limited_api=stable,
            optional=True,
        )
    ]


setup(ext_modules=kernels(), cmdclass={"build_ext": BuildKernels})
