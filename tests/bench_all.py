"""Every benchmark of speed and memory, one after the other; options are passed on to each.

    python tests/bench_all.py --full                   a random 3B model in bfloat16, for a GPU with 80 GB
"""
import subprocess
import sys
from pathlib import Path

for name in ("generate", "update", "step", "memory"):
    print(f"\n## bench_{name}.py", flush=True)
    subprocess.run([sys.executable, Path(__file__).with_name(f"bench_{name}.py"), *sys.argv[1:]], check=False)
