"""``python -m helpers.recipes --renew STAGE...``: write the digests of stages whose recipe was raised."""

import argparse
import sys

from helpers.recipes.guard import FILE, VARIANTS, renew

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--renew", nargs="+", metavar="STAGE", choices=[*VARIANTS, "all"], required=True)
asked = parser.parse_args().renew
refused = renew(VARIANTS if "all" in asked else asked)
if refused:
    sys.exit(f"{', '.join(refused)}: the digests moved and the recipe did not: raise it in recipes.yaml, both copies")
print(f"{FILE}: renewed")
