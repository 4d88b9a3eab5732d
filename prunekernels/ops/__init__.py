"""The C++ operators as Python sees them: the extension or its pure-torch fallback, their gradients, mask tables."""
