"""Audits and replays of compiled programs: `audit.audit` compares with the plan, `replay.replay` times a schedule."""
