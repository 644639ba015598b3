"""`python -m effbench`, which launchers start: `torchrun --nproc-per-node 2 -m effbench run --engine deepspeed`."""

import sys

from effbench.cli import main

sys.exit(main())
