// SPDX-License-Identifier: Apache-2.0

/// Which kernel a scenario is about.
enum LabKernel: String {
  case patched, unpatched
}

/// One thing that a kernel has to do.
struct Scenario {
  let name: String
  let kernels: Set<LabKernel>
  /// Throws when it does not; a note for the table otherwise.
  let body: () throws -> String

  init(_ name: String, on kernels: Set<LabKernel> = [.patched], _ body: @escaping () throws -> Void)
  {
    self.name = name
    self.kernels = kernels
    self.body = {
      try body()
      return ""
    }
  }

  private init(
    _ name: String, _ kernels: Set<LabKernel>, noting body: @escaping () throws -> String
  ) {
    self.name = name
    self.kernels = kernels
    self.body = body
  }

  /// One whose body has something to tell.
  static func noting(
    _ name: String, on kernels: Set<LabKernel> = [.patched], _ body: @escaping () throws -> String
  ) -> Self {
    Self(name, kernels, noting: body)
  }
}

/// What was expected and did not happen.
struct Mismatch: Error, CustomStringConvertible {
  let description: String
}

/// Fails the scenario unless both are equal.
func expect<Value: Equatable>(_ found: Value, _ expected: Value, _ what: String) throws {
  guard found == expected else {
    throw Mismatch(description: "\(what): \(found), expected \(expected)")
  }
}

/// Fails the scenario unless the condition holds.
func require(_ condition: Bool, _ what: String) throws {
  guard condition else { throw Mismatch(description: what) }
}

/// Runs the scenarios of a kernel and prints a table; returns how many failed.
func run(_ scenarios: [Scenario], on kernel: LabKernel) -> Int {
  var passed = 0
  var failed = 0
  for scenario in scenarios where scenario.kernels.contains(kernel) {
    var result = "passed"
    do {
      let note = try scenario.body()
      if !note.isEmpty { result += ": \(note)" }
      passed += 1
    } catch {
      result = "FAILED: \(error)"
      failed += 1
    }
    let name = scenario.name + String(repeating: " ", count: max(0, 72 - scenario.name.count))
    print("\(name) \(kernel.rawValue)  \(result)")
  }
  print("\(passed) passed, \(failed) failed")
  return failed
}
