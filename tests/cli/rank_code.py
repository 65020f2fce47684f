"""`disttrain` under a launcher that hides how its ranks end: the exit code goes to the file `$CODES/RANK`."""

import os
from pathlib import Path

from disttrain.cli.app import main

code: object = 0
try:
    main()
except SystemExit as error:
    code = error.code
(Path(os.environ["CODES"]) / os.environ["RANK"]).write_text(str(code))
raise SystemExit(code)
