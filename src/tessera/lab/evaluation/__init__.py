"""What memories hold and cost, measured on models that are trained for it, as tables, JSON and pictures."""
