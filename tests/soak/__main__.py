"""Runs the soak of tests/soak/pool.py."""

import sys

from soak.pool import main

sys.exit(main())
