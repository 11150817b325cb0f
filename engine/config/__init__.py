"""What a run is told: the schema of its configuration, how a recipe and `key=value` words become one, recipes."""
