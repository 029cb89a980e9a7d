"""The room of radiance fields: how samples, and views that were not given, are measured."""
