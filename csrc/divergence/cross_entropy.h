// No teacher: the drivers compute only the cross-entropy with the labels.
#pragma once

namespace abkd {

struct CrossEntropy {
  static constexpr bool has_teacher = false, adapts = false;
};

}  // namespace abkd
