"""The C++ operators in Python: the compiled extension or its pure-torch fallback, their gradients, mask tables."""
