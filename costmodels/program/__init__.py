"""The program that is costed and searched: values, operations over factors, regions."""

from costmodels.program.program import Factor as Factor
from costmodels.program.program import Operation as Operation
from costmodels.program.program import Output as Output
from costmodels.program.program import Program as Program
from costmodels.program.program import Region as Region
from costmodels.program.program import Use as Use
from costmodels.program.program import Value as Value
