// Runs the CUDA row kernel on the host: reads launches from standard input and writes the results to standard output,
// in the format of tests/csrc/emulated_kernel.py. The only argument is the line of a barrier in rows.cuh to leave out.
#include "row_kernels.h"

namespace {

using namespace abkd;

struct Request {
  int64_t dtype, family, count, vocab;
  int64_t student_offset, student_stride, teacher_offset, teacher_stride, gradient_offset, gradient_stride;
  int64_t has_teacher, gradient_mode, has_labels, statistics_mode, has_upstream;
  int64_t kept, order;
  double parameters[kParameters], temperature, hard_weight;
};
enum GradientMode : int64_t { kNoGradient, kApart, kInPlace };
// kRead: they make the gradient. kNormalizers: nothing else is made. kSums: they hold the log-normalizers.
enum StatisticsMode : int64_t { kNoStatistics, kWritten, kRead, kNormalizers, kSums };

// An array of exactly `bytes`, so that AddressSanitizer notices accesses beyond its end.
struct Array {
  explicit Array(int64_t bytes) : bytes(size_t(bytes)), data(std::malloc(this->bytes)) {}
  Array(const Array&) = delete;
  ~Array() { std::free(data); }

  void read() {
    if (std::fread(data, 1, bytes, stdin) != bytes) emulator::Block::fail("the request ends early");
  }
  void write() const { std::fwrite(data, 1, bytes, stdout); }

  size_t bytes;
  void* data;
};

// `bytes` as in rows.cu, which also chooses `kept`.
void launch(const Request& request, const Rows& rows, size_t bytes) {
  emulator::with_kernel(rows, [&](auto kernel, const auto& divergence) {
    emulator::launch(unsigned(rows.count), cuda::kThreads, cuda::shared_rows, sizeof(cuda::shared_rows), bytes,
                     int(request.order), [&] { kernel(rows, divergence, int(request.kept)); });
  });
}

template <typename Logit>
void serve(const Request& request) {
  const auto extent = [&](int64_t offset, int64_t stride) {
    return (offset + (request.count - 1) * stride + request.vocab) * int64_t(sizeof(Logit));
  };
  const auto start = [](Array& array, int64_t offset) { return static_cast<Logit*>(array.data) + offset; };

  Array student(extent(request.student_offset, request.student_stride));
  Array teacher(extent(request.teacher_offset, request.teacher_stride));
  Array gradient(extent(request.gradient_offset, request.gradient_stride));
  Array labels(request.count * int64_t(sizeof(int64_t))), upstream(request.count * int64_t(sizeof(float)));
  Array losses(request.count * int64_t(sizeof(float))), statistics(request.count * int64_t(sizeof(Statistics)));

  const int64_t mode = request.statistics_mode;
  const bool has_losses = mode != kRead && mode != kNormalizers;
  student.read();
  if (request.has_teacher) teacher.read();
  if (request.gradient_mode == kApart) gradient.read();
  if (request.has_labels) labels.read();
  if (request.has_upstream) upstream.read();
  if (mode == kRead || mode == kSums) statistics.read();

  Rows rows{};
  rows.dtype = DType(request.dtype);
  rows.count = request.count;
  rows.vocab = request.vocab;
  rows.student = start(student, request.student_offset);
  rows.student_stride = request.student_stride;
  if (request.has_teacher) rows.teacher = start(teacher, request.teacher_offset);
  rows.teacher_stride = request.teacher_stride;
  if (request.gradient_mode == kApart) rows.gradient = start(gradient, request.gradient_offset);
  if (request.gradient_mode == kInPlace) rows.gradient = start(student, request.student_offset);
  rows.gradient_stride = request.gradient_mode == kInPlace ? request.student_stride : request.gradient_stride;
  if (request.has_labels) rows.labels = static_cast<int64_t*>(labels.data);
  if (request.has_upstream) rows.upstream = upstream.data;
  if (has_losses) rows.losses = losses.data;
  if (mode != kNoStatistics) rows.statistics = static_cast<Statistics*>(statistics.data);
  rows.normalizes = mode != kRead && mode != kSums;
  rows.family = Family(request.family);
  std::copy_n(request.parameters, kParameters, rows.parameters);
  rows.temperature = request.temperature;
  rows.hard_weight = request.hard_weight;
  launch(request, rows, size_t(request.kept * cuda::row_bytes<Logit>(rows.vocab)));

  if (has_losses) losses.write();
  if (request.gradient_mode == kApart) gradient.write();
  if (request.gradient_mode == kInPlace) student.write();
  if (mode != kNoStatistics && mode != kRead) statistics.write();
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) emulator::block.omitted_line = std::atoi(arguments[1]);
  Request request;
  while (std::fread(&request, sizeof(request), 1, stdin) == 1) {
    switch (DType(request.dtype)) {
      case DType::float32:
        serve<float>(request);
        break;
      case DType::bfloat16:
        serve<__nv_bfloat16>(request);
        break;
      case DType::float16:
        serve<__half>(request);
        break;
      case DType::float64:
        emulator::Block::fail("the kernel has no float64");
    }
  }
  if (count > 1 && emulator::block.omitted == 0) emulator::Block::fail("there is no barrier on that line");
}
