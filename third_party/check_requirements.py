"""Prints the pins (name==version) of the given requirement files that this environment does not meet."""
import sys
from importlib.metadata import PackageNotFoundError, version

for path in sys.argv[1:]:
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            pin = line.split("#")[0].strip()
            if not pin:
                continue
            name, _, wanted = pin.partition("==")
            try:
                found = version(name)
            except PackageNotFoundError:
                found = "not installed"
            # The local part (2.11.0+cu130) names a build, not a release.
            if found.split("+")[0] != wanted:
                print(f"{pin} (found: {found})")
