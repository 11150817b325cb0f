"""What a run is told: the schema of its configuration, how recipes and `key=value` words become one, and the recipes."""
