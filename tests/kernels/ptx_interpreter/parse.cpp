// From PTX's text to kernels. Only what nvcc writes for this package's kernels is understood; anything else is a Fault, not skipped.
#include <cctype>
#include <fstream>
#include <memory>
#include <set>
#include <sstream>

#include "kernel.h"

namespace ptx {

namespace {

std::string trim(const std::string& text) {
  const std::size_t first = text.find_first_not_of(" \t\r"), last = text.find_last_not_of(" \t\r");
  return first == std::string::npos ? "" : text.substr(first, last - first + 1);
}

bool starts_with(const std::string& text, const std::string& start) { return text.rfind(start, 0) == 0; }

// At the commas that stand in no bracket.
std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts(1);
  int depth = 0;
  for (const char c : text) {
    depth += (c == '{' || c == '[') - (c == '}' || c == ']');
    if (c == ',' && depth == 0)
      parts.emplace_back();
    else
      parts.back() += c;
  }
  for (std::string& part : parts) part = trim(part);
  if (parts.back().empty()) parts.pop_back();
  return parts;
}

std::string inside(const std::string& bracketed) { return trim(bracketed.substr(1, bracketed.size() - 2)); }

const std::map<std::string, Special> kSpecials = {
    {"%tid.x", Special::kThread},     {"%ctaid.x", Special::kBlockX},   {"%ctaid.y", Special::kBlockY},  {"%ctaid.z", Special::kBlockZ},
    {"%nctaid.x", Special::kBlocksX}, {"%nctaid.y", Special::kBlocksY}, {"%nctaid.z", Special::kBlocksZ}};

// Variables in shared memory whose size the launch decides: all of them start where shared memory does.
std::set<std::string> shared_variables;

// Reads one kernel, a line at a time.
class Parser {
 public:
  Parser(std::string name, const std::map<int, std::string>& files) : files_(files) { kernel_.name = std::move(name); }

  void head(const std::string& line) {
    if (starts_with(line, ".param")) {
      parameter(line);
    } else if (starts_with(line, ".minnctapersm")) {
      kernel_.blocks_per_multiprocessor = std::stoi(line.substr(13));
    } else if (!line.empty() && line != ")" && !starts_with(line, ".maxntid") && !starts_with(line, ".pragma")) {
      throw Fault("a head of a kernel that is not understood: " + line);
    }
  }

  void body(const std::string& line, int number) {
    if (line.empty() || line == "{" || line == "}" || starts_with(line, ".pragma")) return;
    if (line[0] == '$' && line.back() == ':') {
      labels_[line.substr(0, line.size() - 1)] = static_cast<int>(kernel_.instructions.size());
    } else if (starts_with(line, ".loc")) {
      location(line);
    } else if (starts_with(line, ".reg")) {
      registers(line);
    } else if (line.back() == ';' && line[0] != '.') {
      instruction(line.substr(0, line.size() - 1), number);
    } else {
      throw Fault("a line of PTX that is not understood: " + line);
    }
  }

  Kernel finish() {
    for (const auto& [at, label] : jumps_) kernel_.instructions[at].target = labels_.at(label);
    return std::move(kernel_);
  }

 private:
  // `.param .align 8 .b8 NAME[296],`: the kernels take structs.
  void parameter(const std::string& line) {
    std::istringstream words(line);
    std::string word, type, name;
    std::size_t align = 0;
    words >> word >> word >> align >> type >> name;
    const std::size_t bracket = name.find('[');
    if (word != ".align" || type != ".b8" || bracket == std::string::npos) throw Fault("a parameter that is not understood: " + line);
    const std::size_t size = std::stoul(name.substr(bracket + 1));
    const std::size_t offset = (kernel_.parameter_bytes + align - 1) / align * align;
    kernel_.parameters.push_back({name.substr(0, bracket), offset, size});
    kernel_.parameter_bytes = offset + size;
  }

  // `.reg .b32 %r<642>;`: %r0 to %r641.
  void registers(const std::string& line) {
    const std::size_t name = line.find('%'), count = line.find('<');
    if (name == std::string::npos || count == std::string::npos) throw Fault("registers that are not understood: " + line);
    first_register_[line.substr(name, count - name)] = kernel_.registers;
    kernel_.registers += std::stoi(line.substr(count + 1));
  }

  // `.loc 2 41 71, function_name LABEL, inlined_at 1 57 3`: the line, and the one it was called from.
  void location(const std::string& line) {
    const auto place = [&](std::size_t at) {
      std::istringstream words(line.substr(at));
      int file = 0, number = 0;
      words >> file >> number;
      return files_.at(file) + ":" + std::to_string(number);
    };
    source_ = place(4);
    const std::size_t caller = line.find("inlined_at");
    if (caller != std::string::npos) source_ += ", from " + place(caller + 10);
  }

  int constant(std::uint64_t value) {
    const auto [found, added] = constants_.emplace(value, kernel_.registers);
    if (added) kernel_.constants.emplace_back(kernel_.registers++, value);
    return found->second;
  }

  int operand(const std::string& text) {
    if (const auto special = kSpecials.find(text); special != kSpecials.end()) {
      const auto [found, added] = specials_.emplace(text, kernel_.registers);
      if (added) kernel_.specials.emplace_back(kernel_.registers++, special->second);
      return found->second;
    }
    if (text[0] == '%') {
      const std::size_t digits = text.find_first_of("0123456789");
      return first_register_.at(text.substr(0, digits)) + std::stoi(text.substr(digits));
    }
    if (starts_with(text, "0f") || starts_with(text, "0d")) return constant(std::stoull(text.substr(2), nullptr, 16));
    if (std::isdigit(text[0])) return constant(std::stoull(text, nullptr, 0));
    if (text[0] == '-') return constant(static_cast<std::uint64_t>(std::stoll(text, nullptr, 0)));
    for (const Parameter& parameter : kernel_.parameters)
      if (parameter.name == text) return constant(parameter.offset);
    if (shared_variables.count(text) > 0) return constant(0);
    throw Fault("an operand that is not understood: " + text);
  }

  void operands(const std::string& text, std::vector<int>& to) {
    for (const std::string& one : text[0] == '{' ? split(inside(text)) : std::vector<std::string>{text}) to.push_back(operand(one));
  }

  void address(const std::string& text, Instruction& to) {
    const std::string sum = inside(text);
    const std::size_t plus = sum.find('+');
    if (plus != std::string::npos) to.offsets.at(to.sources.size()) = std::stoll(sum.substr(plus + 1));
    to.sources.push_back(operand(trim(sum.substr(0, plus))));
  }

  void instruction(std::string text, int number) {
    Instruction made;
    made.text = text;
    made.line = number;
    made.source = source_;
    if (text[0] == '@') {
      const std::size_t space = text.find_first_of(" \t");
      made.guard_negated = text[1] == '!';
      made.guard = operand(text.substr(made.guard_negated ? 2 : 1, space - (made.guard_negated ? 2 : 1)));
      text = trim(text.substr(space));
    }
    const std::size_t space = text.find_first_of(" \t");
    const std::string name = text.substr(0, space);
    const std::vector<std::string> parts = split(space == std::string::npos ? "" : text.substr(space));
    const auto known = operations().find(name);
    if (known == operations().end()) throw Fault("an instruction that is not understood: " + text);
    made.operation = &known->second;
    switch (known->second.form) {
      case Form::kNone:
        break;
      case Form::kSources:
        for (const std::string& part : parts) operands(part, made.sources);
        break;
      case Form::kDestination: {
        const std::string result = parts.at(0).substr(0, parts[0].find('|'));  // behind it, what a shuffle says and nobody asks
        operands(result, made.destinations);
        for (std::size_t k = 1; k < parts.size(); ++k) operands(parts[k], made.sources);
        break;
      }
      case Form::kLoad:
        operands(parts.at(0), made.destinations);
        address(parts.at(1), made);
        break;
      case Form::kStore:
        address(parts.at(0), made);
        operands(parts.at(1), made.sources);
        break;
      case Form::kCopy:
        address(parts.at(0), made);
        address(parts.at(1), made);
        operands(parts.at(2), made.sources);
        break;
      case Form::kBranch:
        jumps_.emplace_back(kernel_.instructions.size(), parts.at(0));
        break;
    }
    kernel_.instructions.push_back(std::move(made));
  }

  Kernel kernel_;
  const std::map<int, std::string>& files_;
  std::map<std::string, int> first_register_, labels_, specials_;
  std::map<std::uint64_t, int> constants_;
  std::vector<std::pair<std::size_t, std::string>> jumps_;
  std::string source_ = "?";
};

// Kernels are parsed when they are first asked for: a test runs a few of them.
struct Text {
  std::vector<std::string> lines;
  int first_line = 0;
  std::shared_ptr<std::map<int, std::string>> files;
};
std::map<std::string, Text> texts;
std::map<std::string, Kernel> kernels;

Kernel parse(const std::string& name, const Text& text) {
  Parser parser(name, *text.files);
  bool in_body = false;
  for (std::size_t k = 0; k < text.lines.size(); ++k) {
    const std::string line = trim(text.lines[k].substr(0, text.lines[k].find("//")));
    in_body |= line == "{";
    if (in_body)
      parser.body(line, text.first_line + static_cast<int>(k));
    else
      parser.head(line);
  }
  return parser.finish();
}

}  // namespace

std::string Kernel::place(const Instruction& instruction) const {
  return instruction.source + " (" + instruction.text + ", line " + std::to_string(instruction.line) + " of " + name + ")";
}

void load(const std::string& path) {
  std::ifstream in(path);
  if (!in) throw Fault("no PTX at " + path);
  const auto files = std::make_shared<std::map<int, std::string>>();
  Text* current = nullptr;
  int number = 0, depth = 0;
  for (std::string line; std::getline(in, line);) {
    ++number;
    if (const std::size_t entry = line.find(".entry "); entry != std::string::npos) {
      const std::string name = line.substr(entry + 7, line.find('(') - entry - 7);
      kernels.erase(name);
      current = &(texts[name] = {{}, number + 1, files});
    } else if (current != nullptr) {
      current->lines.push_back(line);
      if (trim(line) == "{") ++depth;
      if (trim(line) == "}" && --depth == 0) current = nullptr;
    } else if (starts_with(line, ".extern .shared")) {  // `.extern .shared .align 128 .b8 NAME[];`
      const std::size_t name = line.rfind(' ') + 1;
      shared_variables.insert(line.substr(name, line.find('[') - name));
    } else if (starts_with(trim(line), ".file")) {  // behind the kernels: `.file 2 "/folder/device.h"`
      const std::string path_of_file = line.substr(line.find('"') + 1, line.rfind('"') - line.find('"') - 1);
      (*files)[std::stoi(trim(line).substr(5))] = path_of_file.substr(path_of_file.rfind('/') + 1);
    }
  }
}

std::string not_understood() {
  try {
    for (const auto& [name, text] : texts) find(name);
    return "";
  } catch (const Fault& fault) {
    return fault.what();
  }
}

const Kernel& find(const std::string& name) {
  const auto text = texts.find(name);
  if (text == texts.end()) throw Fault("no PTX was loaded of " + name);
  if (kernels.count(name) == 0) kernels.emplace(name, parse(name, text->second));
  return kernels.at(name);
}

}  // namespace ptx
