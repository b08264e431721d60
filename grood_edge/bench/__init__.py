"""How fast an artifact is here, where its time goes, and what it costs over the bare classifier."""
