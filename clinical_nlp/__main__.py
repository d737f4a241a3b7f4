"""`python -m clinical_nlp`, also for `accelerate launch -m clinical_nlp run ...`."""

import sys

from clinical_nlp.cli import main

if __name__ == "__main__":
    sys.exit(main())
