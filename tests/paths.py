"""Where test data lies."""

from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
DATA = CHECKOUT / "tests" / "data"
PUBLIC_DUMPS = CHECKOUT.parent / "shared" / "data" / "dumps"
