import sys

from xformers_lab.cli import main

sys.exit(main())
