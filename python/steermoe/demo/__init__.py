"""The demo: `demonstration` runs it, `report` shows it; `speech` and `phrases` make what is heard in it."""
