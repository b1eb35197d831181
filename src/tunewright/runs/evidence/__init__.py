"""From per-row scores of base and tuned to measures, flips and a verdict in words fixed in advance."""
