"""A gate for continuous integration: train briefly, then let `gmar report` decide by its exit code."""

import json
import subprocess
import sys

run = sys.argv[1] if len(sys.argv) > 1 else "gmar"
gmar = [sys.executable, "-m", "gmar_lightning"]  # or the command `gmar`
command = [*gmar, "report", run, "--json", "--fail-on", "collapse,nonfinite,diverged"]
done = subprocess.run(command, capture_output=True, text=True)
if done.returncode == 2:
    sys.exit(f"no usable record: {done.stderr}")

report = json.loads(done.stdout)
print(report["verdict"]["headline"])
for finding in report["findings"]:
    print("ALARM" if finding["alarm"] else "note ", finding["text"])
sys.exit(done.returncode)
