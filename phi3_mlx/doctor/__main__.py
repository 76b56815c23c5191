"""`python3 -m phi3_mlx.doctor`, in a clone, needs nothing installed: it says why an installation fails."""

import sys

from .checks import examine, report
from .facts import look

if __name__ == "__main__":
    findings = examine(look())
    print(report(findings))
    sys.exit(any(finding.status == "wrong" for finding in findings))
