// SPDX-License-Identifier: Apache-2.0

/// Runs a script line by line and says what each line came to.
public struct ModelSession: Sendable {
  private var script = ModelScript()
  private var model: Model?

  /// A session at the beginning of a script.
  public init() {}

  /// Takes a line; returns the lines to show: after a step its outcome and the picture,
  /// after anything else nothing.
  public mutating func take(_ line: String) throws(ModelScriptError) -> [String] {
    guard case .step(let operation) = try script.parse(line) else { return [] }
    var model = model ?? Model(script.setup)
    let result = model.apply(operation)
    self.model = model
    var lines = ModelPicture.describe(result)
    if case .register = operation {
      lines[0] = ModelPicture.describeRegistration(result.outcome)
    }
    return (lines + ModelPicture.draw(model)).map { "  " + $0 }
  }
}
