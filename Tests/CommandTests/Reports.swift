// SPDX-License-Identifier: Apache-2.0

/// What `restore --json` says.
struct Restored: Decodable {
  let image: String
  let backing: String
  let faultMode: String
  let strategy: String
  let guest: String
  let vcpus: Int
  let memoryBytes: Int
  let firstInstructionNanoseconds: UInt64
  let doneNanoseconds: UInt64
  let verifiedPages: Int?
  let wrongPages: Int?
  let touchedPages: Int?
  let touchP50Nanoseconds: UInt64?
  let missingFaults: Int
  let minorFaults: Int
  let stageTwoFaults: Int
  let guestMemfd: String?
  let copiedPages: Int
  let continuedPages: Int
  let zeroPages: Int
  let populatedPages: Int
  let failedPages: Int
  let damagedPages: [String]
  let guestError: String?

  var faults: Int { missingFaults + minorFaults }
}

/// What `snapshot --json` says.
struct Saved: Decodable {
  let image: String
  let memoryBytes: Int
  let filledPages: Int
  let guest: String
}

/// What `doctor --json` says.
struct Diagnosis: Decodable {
  struct Memory: Decodable {
    struct Mode: Decodable {
      let modes: [String]
      let operations: [String]?
      let error: String?
    }
    let kind: String
    let unavailable: String?
    let modes: [Mode]
  }
  struct Advice: Decodable {
    let missing: String
    let why: String
    let how: String
  }
  struct Machine: Decodable {
    let available: Bool
  }
  struct GuestMemfd: Decodable {
    let strategy: String?
    let reason: String
  }
  let guestMemfd: GuestMemfd
  let kernel: String
  let userID: UInt32
  let systemCall: String?
  let device: String?
  let features: [String]
  let memory: [Memory]
  let kvm: Machine
  let canRestoreLazily: Bool
  let advice: [Advice]
}

/// Any value in JSON that is no container.
enum Scalar: Decodable, Equatable {
  case null
  case flag(Bool)
  case number(Double)
  case text(String)

  init(from decoder: any Decoder) throws {
    let container = try decoder.singleValueContainer()
    if container.decodeNil() {
      self = .null
    } else if let flag = try? container.decode(Bool.self) {
      self = .flag(flag)
    } else if let number = try? container.decode(Double.self) {
      self = .number(number)
    } else {
      self = .text(try container.decode(String.self))
    }
  }
}
