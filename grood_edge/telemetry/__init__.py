"""What a stream writes or shows: logs, videos, metrics, frames around alarms."""
