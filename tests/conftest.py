"""One thread: workers share the machine, and processes that fork have none of their parent's.

Set before torch is imported.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
