"""Run a command as if the processor had AVX2 and nothing wider: no AVX-512, no VNNI, no AMX.

``python -m sparse_onnx.tools.benchmarks.avx2_only COMMAND [ARGUMENT]...``, e.g. with
``python -m sparse_onnx.tools.benchmarks.tables --section bert``. Every library in the command and in the processes that
it starts sees such a processor and chooses its own kernels for it: ours, ONNX Runtime's and those of other engines,
which have no option for it or do not heed theirs. So a newer machine shows what an older one would give, with all
engines on equal terms. Their ratios carry over better than their times do.

Takes Linux on x86-64, a C compiler, a processor that can trap ``cpuid`` (most since 2013), and the right to mount,
since some engines read ``/proc/cpuinfo``. The exit status is the command's; 2 if it could not be started like this.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["main", "masked_cpuinfo"]

_HIDDEN = re.compile(r" (avx512\w*|avx_vnni\w*|avx10\w*|avx_ifma|avx_ne_convert|amx_\w+)\b")
# In a mount namespace of its own, so that nobody else sees the other file.
_SCRIPT = 'mount --bind "$1" /proc/cpuinfo && export LD_PRELOAD="$2" && shift 2 && exec "$@"'


def masked_cpuinfo(text: str) -> str:
    """``/proc/cpuinfo`` of the same processor with AVX2 and nothing wider."""
    return "".join(
        _HIDDEN.sub("", line) if line.startswith("flags") else line for line in text.splitlines(keepends=True)
    )


def main(arguments: list[str]) -> int:
    """Run the command ``arguments``; its exit status."""
    if not arguments:
        return _fail("write the command to run behind it")
    tools = [shutil.which(name) for name in ("cc", "unshare", "mount")]
    if None in tools or not Path("/proc/cpuinfo").exists():
        return _fail("it takes Linux, a C compiler, unshare and mount")
    with tempfile.TemporaryDirectory(prefix="sparse-onnx-") as folder:
        library, cpuinfo = Path(folder, "avx2_only.so"), Path(folder, "cpuinfo")
        cpuinfo.write_text(masked_cpuinfo(Path("/proc/cpuinfo").read_text()))
        source = Path(__file__).with_suffix(".c")
        built = subprocess.run(
            ["cc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], capture_output=True, text=True
        )
        if built.returncode:
            return _fail(f"{source} does not compile: {built.stderr.strip()}")
        command = ["unshare", "--mount", "sh", "-c", _SCRIPT, "sh", str(cpuinfo), str(library), *arguments]
        status = subprocess.run(command).returncode
        return status if status >= 0 else 128 - status  # ended by a signal: as shells tell it


def _fail(reason: str) -> int:
    print(f"avx2_only: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
