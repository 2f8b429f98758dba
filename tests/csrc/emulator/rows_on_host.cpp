// Runs the CUDA row kernel on the host: reads launches from standard input and writes the results to standard output,
// in the format of tests/csrc/emulated_kernel.py. The only argument is the place of a barrier to leave out, as in
// "rows.cuh:100".
#include "row_kernels.h"

namespace {

using namespace abkd;

struct Request {
  int64_t student_dtype, teacher_dtype, gradient_dtype, family, count, vocab;
  int64_t student_offset, student_stride, teacher_offset, teacher_stride, gradient_offset, gradient_stride;
  int64_t has_teacher, gradient_mode, has_labels, statistics_mode, has_upstream;
  int64_t kept, order;
  double parameters[kParameters], temperature, hard_weight;
  Map student_map, teacher_map;
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

void launch(const Request& request, const Rows& rows) {
  // As in rows.cu, which also chooses `kept`.
  const size_t bytes = size_t(cuda::kept_bytes(rows, int(request.kept)));
  emulator::with_kernel(rows, [&](auto kernel, const auto& divergence) {
    emulator::launch(unsigned(rows.count), cuda::kThreads, cuda::shared_rows, sizeof(cuda::shared_rows), bytes,
                     int(request.order), [&] { kernel(rows, divergence, int(request.kept)); });
  });
}

void serve(const Request& request) {
  const auto dtype = [](int64_t number) {
    if (DType(number) == DType::float64) emulator::Block::fail("the kernel has no float64");
    return DType(number);
  };
  const DType of_student = dtype(request.student_dtype), of_teacher = dtype(request.teacher_dtype),
              of_gradient = dtype(request.gradient_dtype);
  const auto extent = [&](int64_t offset, int64_t stride, DType type) {
    return (offset + (request.count - 1) * stride + request.vocab) * cuda::size_of(type);
  };
  const auto start = [](Array& array, int64_t offset, DType type) {
    return static_cast<unsigned char*>(array.data) + offset * cuda::size_of(type);
  };

  Array student(extent(request.student_offset, request.student_stride, of_student));
  Array teacher(extent(request.teacher_offset, request.teacher_stride, of_teacher));
  Array gradient(extent(request.gradient_offset, request.gradient_stride, of_gradient));
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
  rows.count = request.count;
  rows.vocab = request.vocab;
  rows.student = {start(student, request.student_offset, of_student), request.student_stride, of_student,
                  request.student_map};
  if (request.has_teacher)
    rows.teacher = {start(teacher, request.teacher_offset, of_teacher), request.teacher_stride, of_teacher,
                    request.teacher_map};
  rows.gradient_dtype = of_gradient;
  if (request.gradient_mode == kApart) rows.gradient = start(gradient, request.gradient_offset, of_gradient);
  if (request.gradient_mode == kInPlace) rows.gradient = start(student, request.student_offset, of_student);
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
  launch(request, rows);

  if (has_losses) losses.write();
  if (request.gradient_mode == kApart) gradient.write();
  if (request.gradient_mode == kInPlace) student.write();
  if (mode != kNoStatistics && mode != kRead) statistics.write();
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) emulator::block.omitted_place = arguments[1];
  Request request;
  while (std::fread(&request, sizeof(request), 1, stdin) == 1) serve(request);
  if (count > 1 && emulator::block.omitted == 0) emulator::Block::fail("no thread came to that barrier");
}
