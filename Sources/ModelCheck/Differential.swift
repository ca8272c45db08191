// SPDX-License-Identifier: Apache-2.0

public import GuestMemoryModel

/// Runs the same steps on the model and on a kernel, and compares every answer.
public struct Differential {
  /// A step on which they disagree.
  public struct Disagreement: Sendable, CustomStringConvertible {
    /// The seed of the sequence.
    public var seed: UInt64
    /// The shortest list of steps found that still disagrees; the last is the one.
    public var operations: [Operation]
    /// What the model says.
    public var model: StepResult
    /// What the kernel did.
    public var kernel: StepResult

    /// Everything that is needed to look into it.
    public var description: String {
      let steps = operations.map { "  \($0)" }.joined(separator: "\n")
      return "seed \(seed), after shrinking:\n\(steps)\n  model:  \(model)\n  kernel: \(kernel)"
    }
  }

  /// What a run came to.
  public struct Report: Sendable {
    /// Steps that both took.
    public var operations = 0
    /// How many of them made a touch wait.
    public var waits = 0
    /// The first disagreement.
    public var disagreement: Disagreement?
  }

  private let setup: Setup
  private let makeSubject: (Setup) throws -> KernelSubject
  private let stepsInSequence = 250

  /// A comparison for a setup; `makeSubject` gives fresh memory for each sequence.
  public init(_ setup: Setup, makeSubject: @escaping (Setup) throws -> KernelSubject) {
    self.setup = setup
    self.makeSubject = makeSubject
  }

  /// Takes at least `operations` steps in sequences with the seeds `seed`, `seed + 1`...
  ///
  /// - Parameter progress: called after each sequence with steps done and in all.
  public func run(
    operations: Int, seed: UInt64, progress: (@Sendable (_ done: Int, _ total: Int) -> Void)? = nil
  ) throws -> Report {
    var report = Report()
    var sequenceSeed = seed
    while report.operations < operations {
      var generator = OperationGenerator(seed: sequenceSeed, setup: setup)
      let steps = (0..<stepsInSequence).map { _ in generator.next() }
      if let failure = try compare(steps, &report) {
        let shortest = Shrinker.shrink(Array(steps[...failure.index])) { candidate in
          var ignored = Report()
          return (try? compare(candidate, &ignored)) != nil
        }
        var ignored = Report()
        let last = try compare(shortest, &ignored) ?? failure
        report.disagreement = Disagreement(
          seed: sequenceSeed, operations: Array(shortest.prefix(last.index + 1)),
          model: last.model, kernel: last.kernel)
        return report
      }
      sequenceSeed &+= 1
      progress?(report.operations, operations)
    }
    return report
  }

  /// Where a sequence disagrees.
  private typealias Failure = (index: Int, model: StepResult, kernel: StepResult)

  private func compare(_ steps: [Operation], _ report: inout Report) throws -> Failure? {
    let subject = try makeSubject(setup)
    var model = Model(subject.setup)
    for (index, step) in steps.enumerated() {
      var next = model
      let expected = next.apply(step)
      // One thread waits at a time: a second touch that would is left out.
      if expected.outcome.isWaiting, !model.waiters.isEmpty { continue }
      // Nor is there a comparison of what never ends.
      if expected.outcome == .neverEnds || expected.resumed.contains(.neverEnds) { continue }
      model = next
      let actual = subject.perform(step, expecting: expected)
      report.operations += 1
      if expected.outcome.isWaiting { report.waits += 1 }
      if actual != expected { return (index, expected, actual) }
    }
    return nil
  }
}
