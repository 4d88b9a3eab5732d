// Argument checks of the operators. Every message reads "operator: argument: expected ..., got ...".
#pragma once

#include <c10/util/Exception.h>

#define PK_CHECK(condition, op, argument, expected, ...) \
  TORCH_CHECK_VALUE(condition, op, ": ", argument, ": expected ", expected, ", got ", __VA_ARGS__)
