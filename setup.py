"""Builds the compiled core: every ext/NAME.pyx becomes larpixdaq._native.NAME.

LARPIXDAQ_BUILD=checked compiles with bounds checks and debug assertions; =sanitized the code of the fast build with
AddressSanitizer and UBSan (run it with libasan preloaded); =fuzzed, with CC=clang, also with counters of branches for
bench/fuzz.py; without it the build is the fast one.

Cython's code for memoryviews is compiled as the module _shared for all modules but one. All processors build.
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

MODE = os.environ.get("LARPIXDAQ_BUILD", "fast")
CHECKED = MODE == "checked"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
FLAGS = {
    "fast": ["-O3", "-g0"],
    "checked": ["-O1", "-g", "-UNDEBUG"],
    "sanitized": ["-O0", "-g1", "-UNDEBUG", *SANITIZERS],
    "fuzzed": ["-O1", "-g", "-UNDEBUG", *SANITIZERS, "-fsanitize=fuzzer-no-link"],
}
if MODE not in FLAGS:
    raise SystemExit(f"LARPIXDAQ_BUILD: expected one of {', '.join(FLAGS)}, found {MODE!r}")
SHARED = "larpixdaq._native._shared"
JOBS = len(os.sched_getaffinity(0))

# Keeps its own copy: with the shared one the loop of PACMAN words is 8 % slower, though it has fewer instructions.
ALONE = "decoders"


def compiled(names: list[str], **options: str) -> list[Extension]:
    modules = [
        Extension(
            f"larpixdaq._native.{name}",
            [f"ext/{name}.c" if name == "_shared" else f"ext/{name}.pyx"],
            extra_compile_args=FLAGS[MODE],
            extra_link_args=[flag for flag in FLAGS[MODE] if flag in SANITIZERS],
        )
        for name in names
    ]
    return cythonize(
        modules,
        nthreads=JOBS,
        include_path=["ext"],
        build_dir=f"build/cython-{MODE}",
        force=MODE != "fast",
        compiler_directives={
            "language_level": 3,
            "boundscheck": CHECKED,
            "wraparound": CHECKED,
            "initializedcheck": CHECKED,
            "cdivision": not CHECKED,
            "embedsignature": False,
            # Nothing here is pickled or doctested; without these the modules are what their stubs say.
            "auto_pickle": False,
            "autotestdict": False,
        },
        **options,
    )


sharing = sorted(source.stem for source in Path("ext").glob("*.pyx") if source.stem != ALONE)
# Cython makes _shared.c
modules = compiled(["_shared", *sharing], shared_utility_qualified_name=SHARED) + compiled([ALONE])
# setuptools packs all that is in build/lib*: also files of an earlier build whose source is gone.
names = {module.name.rpartition(".")[2] for module in modules}
for old in Path("build").glob("lib*/larpixdaq/**/*"):
    if old.is_file() and not (old.suffix == ".so" and old.name.partition(".")[0] in names):
        old.unlink()
# The largest module first, so that no processor waits for it at the end.
modules.sort(key=lambda module: -Path(module.sources[0]).stat().st_size)
setup(ext_modules=modules, options={"build_ext": {"parallel": JOBS}})
