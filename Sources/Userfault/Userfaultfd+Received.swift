// SPDX-License-Identifier: Apache-2.0

public import LinuxSystem
internal import SystemPackage

// A userfaultfd that came from another process, which may be wrong about it or lie.
extension Userfaultfd {
  /// Takes over a descriptor that another process sent, after a look at what it is.
  ///
  /// The kernel says so itself: /proc/self/fd names the kind, /proc/self/fdinfo has the
  /// negotiated features and the ioctls that the kernel has (fs/userfaultfd.c,
  /// userfaultfd_show_fdinfo). UFFDIO_POISON works also where its feature was not negotiated, so
  /// `features` has `.poison` if it is among them. No userfaultfd is made for that: a service may
  /// be forbidden to.
  ///
  /// Throws `.notUserfaultfd`, `.notNegotiated`, and `.failed` when /proc cannot be read. The
  /// descriptor is closed then.
  public init(receiving descriptor: consuming OwnedDescriptor) throws(UserfaultError) {
    let name: String
    let information: String
    do throws(Errno) {
      name = try descriptor.kernelName
      information = try descriptor.kernelInformation
    } catch {
      throw UserfaultError(
        .failed, attempt: "Looking at a received descriptor in /proc/self", errno: error)
    }
    guard name == "anon_inode:[userfaultfd]" else {
      throw UserfaultError(.notUserfaultfd, attempt: name)
    }
    guard let features = Self.features(information) else {
      throw UserfaultError(.notNegotiated, attempt: "UFFDIO_API by the sender")
    }
    do throws(Errno) {
      try self.init(adopting: descriptor, features: features)
    } catch {
      throw UserfaultError(
        .failed, attempt: "Making a received userfaultfd non-blocking", errno: error)
    }
  }

  /// The features of the line "API:\taa:FEATURES:IOCTLS" of fdinfo, all in hexadecimal: those
  /// that were negotiated, and `.poison` where bit 8 of the ioctls says that there is
  /// UFFDIO_POISON; `nil` before UFFDIO_API.
  static func features(_ information: String) -> UserfaultFeatures? {
    // The kernel keeps a bit of its own among them (UFFD_FEATURE_INITIALIZED).
    let initialized: UInt64 = 1 << 31
    for line in information.split(separator: "\n") where line.hasPrefix("API:") {
      let fields = line.dropFirst(4).split(separator: ":")
      guard fields.count == 3, let bits = UInt64(fields[1], radix: 16), bits & initialized != 0,
        let operations = UInt64(fields[2], radix: 16).map(RangeOperations.init(rawValue:))
      else { return nil }
      return UserfaultFeatures(rawValue: bits & ~initialized)
        .union(operations.contains(.poison) ? .poison : [])
    }
    return nil
  }
}

extension Userfaultfd {
  /// Whether the process whose memory it watches still has that memory. A userfaultfd says so
  /// by no event.
  public var hasAddressSpace: Bool {
    // Nobody maps anything there: refused with EINVAL, but ENOMEM comes first when the address
    // space is gone (mm/userfaultfd.c, userfaultfd_register). Who does, with MAP_FIXED, has that
    // page registered and nothing else of it.
    let nowhere = HostRange(start: HostAddress(Self.topmostPage), length: 4096)
    do throws(Errno) {
      try register(nowhere, modes: .missing)
      return true
    } catch {
      return error != .noMemory
    }
  }

  /// The last page below the end of a process's address space, which the kernel gives to nobody
  /// who does not ask for it.
  private static var topmostPage: UInt64 {
    #if arch(arm64)
      0x0000_FFFF_FFFF_F000
    #else
      0x0000_7FFF_FFFF_E000
    #endif
  }
}
