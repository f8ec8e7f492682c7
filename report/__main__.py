"""`python -m report`: see report/commands.py."""

import sys

from report.commands import main

sys.exit(main(sys.argv[1:]))
