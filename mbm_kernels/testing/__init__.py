"""What the library's tests use, for users' kernels too: the error rule, poison, a suite."""

from mbm_kernels.testing.errors import Budget as Budget
from mbm_kernels.testing.errors import assert_matches as assert_matches
from mbm_kernels.testing.errors import max_abs as max_abs
from mbm_kernels.testing.hiding import Hiding as Hiding
from mbm_kernels.testing.layouts import LAYOUTS as LAYOUTS
from mbm_kernels.testing.layouts import relayout as relayout
from mbm_kernels.testing.poison import poison as poison
from mbm_kernels.testing.suite import Case as Case
from mbm_kernels.testing.suite import OpSuite as OpSuite
