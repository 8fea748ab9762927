"""The plan that the pages are of, and its audit."""

from __future__ import annotations

from typing import Any

import pytest

import autoshard
from autoshard.plan import Plan
from tests.support.reports import network, small_arguments, small_plan


@pytest.fixture(scope="session")
def plan() -> Plan:
    return small_plan()


@pytest.fixture(scope="session")
def audit(plan: Plan) -> dict[str, Any]:
    return autoshard.audit(plan, network, *small_arguments(), target="host").to_dict()
