// swift-tools-version: 6.2
// SPDX-License-Identifier: Apache-2.0

import PackageDescription

/// One set of rules for all Swift targets: language mode 6, strict memory
/// safety, and no warnings.
let swiftSettings: [SwiftSetting] = [
  .swiftLanguageMode(.v6),
  .strictMemorySafety(),
  .treatAllWarnings(as: .error),
  .enableUpcomingFeature("InternalImportsByDefault"),
  .enableUpcomingFeature("MemberImportVisibility"),
  .enableUpcomingFeature("ExistentialAny"),
]

let cSettings: [CSetting] = [.treatAllWarnings(as: .error)]

let systemPackage = Target.Dependency.product(name: "SystemPackage", package: "swift-system")

func library(
  _ name: String, _ dependencies: [Target.Dependency], path: String? = nil
) -> Target {
  .target(
    name: name, dependencies: dependencies + [systemPackage], path: path,
    swiftSettings: swiftSettings)
}

func tests(
  _ name: String, _ dependencies: [Target.Dependency], exclude: [String] = []
) -> Target {
  .testTarget(
    name: name, dependencies: dependencies + ["TestSupport", systemPackage], exclude: exclude,
    swiftSettings: swiftSettings)
}

let package = Package(
  name: "faultline",
  products: [
    .executable(name: "faultline", targets: ["faultline"]),
    .library(name: "LinuxSystem", targets: ["LinuxSystem"]),
    .library(name: "Userfault", targets: ["Userfault"]),
    .library(name: "KVM", targets: ["KVM"]),
    .library(name: "GuestMemory", targets: ["GuestMemory"]),
    .library(name: "KVMDirtyTracking", targets: ["KVMDirtyTracking"]),
    .library(name: "GuestMemoryModel", targets: ["GuestMemoryModel"]),
    .library(name: "MemoryImage", targets: ["MemoryImage"]),
    .library(name: "Snapshot", targets: ["Snapshot"]),
    .library(name: "MemoryImport", targets: ["MemoryImport"]),
    .library(name: "Pager", targets: ["Pager"]),
    .library(name: "VMMAdapters", targets: ["VMMAdapters"]),
    .library(name: "HandoverClient", targets: ["HandoverClient"]),
  ],
  dependencies: [
    .package(url: "https://github.com/apple/swift-argument-parser", from: "1.8.2"),
    .package(url: "https://github.com/apple/swift-system", from: "1.8.1"),
    .package(url: "https://github.com/jpsim/Yams", from: "6.2.2"),
    .package(url: "https://github.com/apple/swift-log", from: "1.16.2"),
  ],
  targets: [
    // C: kernel ABI, a hash, the guest's machine code, and the benchmarks' peer and hostile guests.
    .target(name: "CLinux", cSettings: cSettings),
    .systemLibrary(name: "CXXHash", providers: [.apt(["libxxhash-dev"])]),
    .systemLibrary(name: "CCrypto", providers: [.apt(["libssl-dev"])]),
    .systemLibrary(name: "CZstd", providers: [.apt(["libzstd-dev"])]),
    .target(name: "CGuestProgram", cSettings: cSettings),
    .target(
      name: "CMinimalHandler", path: "Benchmarks/CMinimalHandler", cSettings: cSettings,
      linkerSettings: [.linkedLibrary("pthread")]),

    .target(
      name: "CHostileVMM", path: "Benchmarks/CHostileVMM", cSettings: cSettings,
      linkerSettings: [.linkedLibrary("pthread")]),

    // The libraries; each may import only those above it.
    .target(name: "GuestMemoryModel", swiftSettings: swiftSettings),
    library("LinuxSystem", ["CLinux"]),
    library("Userfault", ["LinuxSystem", "CLinux"]),
    library("KVM", ["LinuxSystem", "CLinux"]),
    library("GuestMemory", ["LinuxSystem", "Userfault"]),
    library("KVMDirtyTracking", ["KVM", "GuestMemory", "LinuxSystem"]),
    library("MemoryImage", ["LinuxSystem", "CXXHash", "CZstd", "CCrypto"]),
    library("MemoryImport", ["MemoryImage", "LinuxSystem"]),
    library("Pager", ["GuestMemory", "Userfault", "MemoryImage", "LinuxSystem"]),
    library("HandoverProtocol", []),
    library("HandoverClient", ["HandoverProtocol", "Userfault", "LinuxSystem"]),
    library(
      "VMMAdapters",
      ["HandoverProtocol", "Pager", "MemoryImage", "GuestMemory", "Userfault", "LinuxSystem"]),
    .target(
      name: "DaemonConfiguration",
      dependencies: [
        "LinuxSystem", systemPackage, .product(name: "Yams", package: "Yams"),
      ],
      swiftSettings: swiftSettings),
    .target(
      name: "FaultlineDaemon",
      dependencies: [
        "DaemonConfiguration", "VMMAdapters", "HandoverProtocol", "Pager", "MemoryImage",
        "GuestMemory", "Userfault", "LinuxSystem", "CLinux", systemPackage,
        .product(name: "Logging", package: "swift-log"),
      ],
      swiftSettings: swiftSettings),
    library(
      "TestGuest", ["KVM", "KVMDirtyTracking", "GuestMemory", "LinuxSystem", "CGuestProgram"]),
    library("Snapshot", ["GuestMemory", "MemoryImage", "LinuxSystem"]),
    library(
      "SnapshotRestore",
      [
        "TestGuest", "Snapshot", "HandoverClient", "HandoverProtocol", "Pager", "MemoryImage",
        "GuestMemory", "Userfault", "KVM", "LinuxSystem",
      ]),
    library(
      "ModelCheck",
      ["GuestMemoryModel", "GuestMemory", "Userfault", "LinuxSystem", "CLinux", "CGuestProgram"]),
    library(
      "HostileGuests", ["MemoryImage", "LinuxSystem", "CHostileVMM"],
      path: "Benchmarks/HostileGuests"),
    library(
      "BenchmarkSuite",
      [
        "HostileGuests", "SnapshotRestore", "Snapshot", "TestGuest", "Pager", "MemoryImport",
        "MemoryImage",
        "GuestMemory", "Userfault", "KVM", "LinuxSystem", "CMinimalHandler", "CZstd", "CXXHash",
      ],
      path: "Benchmarks/BenchmarkSuite"),

    // What runs inside of the lab's kernel.
    .executableTarget(
      name: "GuestMemfdLab",
      dependencies: [
        "ModelCheck", "GuestMemoryModel", "SnapshotRestore", "Snapshot", "TestGuest", "Pager",
        "MemoryImage",
        "GuestMemory", "KVM", "Userfault", "LinuxSystem", systemPackage,
      ],
      path: "Lab/GuestMemfdLab", swiftSettings: swiftSettings),

    // The command.
    .executableTarget(
      name: "faultline",
      dependencies: [
        "SnapshotRestore", "Snapshot", "TestGuest", "Pager", "MemoryImport", "MemoryImage",
        "GuestMemory", "Userfault", "KVM", "LinuxSystem", "BenchmarkSuite", "HostileGuests",
        "GuestMemoryModel",
        "ModelCheck", "FaultlineDaemon", "DaemonConfiguration", systemPackage,
        .product(name: "ArgumentParser", package: "swift-argument-parser"),
      ],
      swiftSettings: swiftSettings),

    // Tests.
    .target(name: "CTestSupport", path: "Tests/CTestSupport", cSettings: cSettings),
    .target(
      name: "TestSupport",
      dependencies: [
        "CTestSupport", "HandoverClient", "HandoverProtocol", "Pager", "MemoryImage",
        "GuestMemory", "Userfault", "LinuxSystem", systemPackage,
      ],
      path: "Tests/TestSupport", swiftSettings: swiftSettings),
    tests("LinuxSystemTests", ["LinuxSystem"]),
    tests(
      "MemoryImageTests", ["MemoryImage", "LinuxSystem", "CXXHash", "CCrypto"],
      exclude: ["Corpus"]),
    tests("MemoryImportTests", ["MemoryImport", "MemoryImage", "LinuxSystem"]),
    tests("UserfaultTests", ["Userfault", "LinuxSystem", "CTestSupport"]),
    tests("KVMTests", ["KVM", "LinuxSystem"]),
    tests(
      "TestGuestTests", ["TestGuest", "KVM", "Userfault", "LinuxSystem", "CGuestProgram"]),
    tests(
      "DirtyTrackingTests",
      ["TestGuest", "KVMDirtyTracking", "KVM", "GuestMemory", "Userfault", "LinuxSystem"]),
    tests(
      "SnapshotTests",
      [
        "Snapshot", "SnapshotRestore", "TestGuest", "KVM", "MemoryImage", "GuestMemory",
        "LinuxSystem", "Userfault", "CTestSupport",
      ]),
    tests("GuestMemoryModelTests", ["GuestMemoryModel"]),
    tests(
      "VMMAdaptersTests",
      [
        "VMMAdapters", "HandoverClient", "HandoverProtocol", "Pager", "MemoryImage",
        "GuestMemory", "Userfault", "LinuxSystem", "CTestSupport", "fake-firecracker",
      ]),
    tests("DaemonConfigurationTests", ["DaemonConfiguration"]),
    tests(
      "DaemonTests",
      [
        "faultline", "FaultlineDaemon", "HandoverClient", "HandoverProtocol", "Pager",
        "MemoryImage", "Userfault", "LinuxSystem", "CTestSupport", "fake-firecracker",
        "clone-process",
      ]),
    tests("CommandTests", ["faultline", "KVM", "MemoryImage", "LinuxSystem"]),
    tests(
      "PagerTests",
      [
        "Pager", "MemoryImage", "GuestMemory", "GuestMemoryModel", "Userfault", "LinuxSystem",
        "CTestSupport", "guest-process", "allocation-probe", "kill-probe",
      ]),
    tests("HostileGuestTests", ["faultline", "HostileGuests"]),
    .executableTarget(
      name: "guest-process",
      dependencies: [
        "TestSupport", "Pager", "GuestMemory", "Userfault", "LinuxSystem", systemPackage,
      ],
      path: "Tests/GuestProcess", swiftSettings: swiftSettings),
    .executableTarget(
      name: "kill-probe",
      dependencies: [
        "TestSupport", "Pager", "GuestMemory", "Userfault", "LinuxSystem", systemPackage,
      ],
      path: "Tests/KillProbe", swiftSettings: swiftSettings),
    .executableTarget(
      name: "fake-firecracker",
      dependencies: ["TestSupport", "Userfault", "LinuxSystem", systemPackage],
      path: "Tests/FakeFirecracker", swiftSettings: swiftSettings),
    .executableTarget(
      name: "clone-process", dependencies: ["TestSupport", "LinuxSystem"],
      path: "Tests/CloneProcess", swiftSettings: swiftSettings),
    .target(
      name: "CAllocationCount", path: "Tests/CAllocationCount", cSettings: cSettings),
    .executableTarget(
      name: "allocation-probe",
      dependencies: [
        "CAllocationCount", "TestSupport", "Pager", "MemoryImage", "GuestMemory", "Userfault",
        "LinuxSystem", systemPackage,
      ],
      path: "Tests/AllocationProbe", swiftSettings: swiftSettings),
  ]
)
