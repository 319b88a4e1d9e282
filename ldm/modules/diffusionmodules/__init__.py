"""UNets, first-stage networks, noise schedules."""
