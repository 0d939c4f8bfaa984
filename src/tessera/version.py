"""The version, for those that may not import the public face."""

VERSION = "0.1.0"
