"""What goes wrong, when, what comes of it and how long that takes: a table at the end of the tests of this folder."""

from collections.abc import Callable

import pytest

_HEADINGS = ("fault", "when", "outcome", "seconds")


def pytest_configure(config: pytest.Config) -> None:
  config.addinivalue_line("markers", "fault(what, when): a row of the table of faults")


@pytest.fixture
def outcome(record_property) -> Callable[[str, float], None]:
  """Tells the table what came of a fault, and after how many seconds."""

  def tell(text: str, seconds: float | None = None) -> None:
    record_property("outcome", text)
    record_property("seconds", seconds)

  return tell


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
  report = (yield).get_result()
  marker = item.get_closest_marker("fault")
  if marker is not None and report.when == "call":
    report.user_properties.append(("fault", marker.args))


def pytest_terminal_summary(terminalreporter) -> None:
  reports = [report for category in ("passed", "failed") for report in terminalreporter.stats.get(category, ())]
  rows = [_row(report) for report in reports if any(name == "fault" for name, _ in report.user_properties)]
  if not rows:
    return
  widths = [max(map(len, column)) for column in zip(_HEADINGS, *rows, strict=True)]
  terminalreporter.section("faults")
  for row in (_HEADINGS, *sorted(rows)):
    cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
    terminalreporter.write_line(" | ".join(cells).rstrip())


def _row(report: pytest.TestReport) -> tuple[str, str, str, str]:
  told = dict(report.user_properties)
  seconds = told.get("seconds") or report.duration
  return (*told["fault"], told.get("outcome", "as expected") if report.passed else "FAILED", f"{seconds:.1f}")
