"""The one place that knows the version. Read by the build, so it imports nothing."""

VERSION = "0.3.0"
