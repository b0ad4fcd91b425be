from .helpers import drives as drives
from .helpers import run as run
