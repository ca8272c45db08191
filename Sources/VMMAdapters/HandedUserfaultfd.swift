// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import SystemPackage
internal import Userfault

// What a VMM made its userfaultfd for, and what it registered, is known before it is served.

/// The first descriptor, as a userfaultfd that can be served.
func receivedUserfaultfd(
  _ descriptors: inout DescriptorList
) throws(HandoverError) -> Userfaultfd {
  switch descriptors.takeFirst() {
  case .none:
    throw HandoverError(.invalidDescriptor, "no descriptor came with the message")
  case .some(let descriptor):
    let userfaultfd: Userfaultfd
    do throws(UserfaultError) {
      userfaultfd = try Userfaultfd(receiving: descriptor)
    } catch {
      throw HandoverError(
        error.code == .failed ? .inputOutput : .invalidDescriptor,
        error.description.trimmingSuffix("."), errno: error.errno)
    }
    if let reason = userfaultfd.features.unservable {
      throw HandoverError(.invalidDescriptor, "the userfaultfd has \(reason)")
    }
    return userfaultfd
  }
}

extension UserfaultFeatures {
  /// Why nobody could serve a userfaultfd with these features; `nil` when somebody can.
  fileprivate var unservable: String? {
    if contains(.signalInsteadOfEvent) {
      return "UFFD_FEATURE_SIGBUS: a touch would be a signal, and no page would be asked for"
    }
    // Each of the three says that writes are to be watched; the kernel asks for none of them when
    // a range is registered for that (fs/userfaultfd.c, userfaultfd_register).
    let writes = intersection([
      .writeProtectFaults, .writeProtectShmemHugetlbfs, .writeProtectUnpopulated,
    ])
    if !writes.isEmpty, !contains(.writeProtectAsync) {
      return "\(writes.fullNames) without UFFD_FEATURE_WP_ASYNC: nobody would resolve its "
        + "write-protect faults"
    }
    if contains(.readWriteProtect), !contains(.readWriteProtectAsync) {
      return "UFFD_FEATURE_RWP without UFFD_FEATURE_RWP_ASYNC: nobody would resolve its faults"
    }
    return nil
  }

  private var fullNames: String {
    kernelNames.map { "UFFD_FEATURE_" + $0 }.joined(separator: " and ")
  }
}

extension HandedRegion {
  /// Checks that regions are registered, all of them, and have the pages that they claim.
  ///
  /// A VMM may change that later; what it harms then is its own guest.
  static func check(
    _ regions: [HandedRegion], against userfaultfd: borrowing Userfaultfd
  ) throws(HandoverError) {
    for (number, region) in regions.enumerated() {
      let defect: RangeDefect?
      do throws(Errno) {
        defect = try userfaultfd.defect(of: region.host, pageSize: region.pageSize)
      } catch {
        throw HandoverError(
          .inputOutput, "it cannot be looked at", region: number, errno: error)
      }
      guard let defect else { continue }
      guard defect != .processGone else {
        throw HandoverError(.disconnected, "the process whose userfaultfd it is has ended")
      }
      throw HandoverError(.invalidRegions, region.words(for: defect), region: number)
    }
  }

  private func words(for defect: RangeDefect) -> String {
    switch defect {
    case .notRegistered(let place):
      "it is not registered at \(place) (UFFDIO_REGISTER): a touch would read zeros"
    case .outside(let place):
      "\(place) is no address of its process"
    case .smallerPages(let place):
      "its page size is \(pageSize), and at \(place) it has pages of \(PageSize.size4KiB)"
    case .largerPages(let place):
      "its page size is \(pageSize), and at \(place) it has larger pages"
    case .writeProtected(let place):
      "it is registered for write protection at \(place), and the userfaultfd has no "
        + "UFFD_FEATURE_WP_ASYNC: nobody would resolve its faults"
    case .processGone: "its process has ended"
    }
  }
}

extension String {
  fileprivate func trimmingSuffix(_ suffix: String) -> String {
    hasSuffix(suffix) ? String(dropLast(suffix.count)) : self
  }
}
