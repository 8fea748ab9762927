"""Reports: a plan or a sweep as one HTML page that needs no network, or as a picture.

`write_report` takes a file of `autoshard search -o` or `autoshard sweep`.
"""

from autoshard.report.write import ReportError as ReportError
from autoshard.report.write import write_report as write_report
