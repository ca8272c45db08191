// SPDX-License-Identifier: Apache-2.0

import GuestMemory
import Testing

@Suite struct DirtyBitmapTests {
  @Test("A bitmap does what a set of numbers does", arguments: [1, 63, 64, 65, 1000, 4096])
  func model(_ pageCount: Int) {
    var bitmap = DirtyBitmap(pageCount: pageCount)
    var model: Set<Int> = []
    func range() -> Range<Int> {
      let first = Int.random(in: 0...pageCount)
      return first..<Int.random(in: first...min(pageCount, first + 200))
    }
    for step in 0..<200 {
      let pages = range()
      switch step % 5 {
      case 0:
        bitmap.insert(pages)
        model.formUnion(pages)
      case 1:
        bitmap.remove(pages)
        model.subtract(pages)
      case 2:
        let page = Int.random(in: 0..<pageCount)
        bitmap.insert(page)
        model.insert(page)
      case 3:
        let (word, page) = (UInt64.random(in: .min ... .max), Int.random(in: 0..<pageCount))
        bitmap.insert(word: word, at: page)
        model.formUnion(
          (0..<64).filter { word >> UInt64($0) & 1 == 1 }.map { page + $0 }
            .filter { $0 < pageCount })
      default:
        var other = DirtyBitmap(pageCount: pageCount)
        other.insert(pages)
        #expect(Set(bitmap.union(other).ranges.joined()) == model.union(pages))
        var rest = bitmap
        rest.subtract(other)
        #expect(Set(rest.ranges.joined()) == model.subtracting(pages))
        var both = bitmap
        both.formIntersection(other)
        #expect(Set(both.ranges.joined()) == model.intersection(pages))
      }
      #expect(Array(bitmap.ranges.joined()) == model.sorted())
      #expect(bitmap.count == model.count)
      #expect(bitmap.isEmpty == model.isEmpty)
      let part = range()
      #expect(Array(bitmap.ranges(in: part).joined()) == model.filter(part.contains).sorted())
      #expect(bitmap.count(in: part) == model.count(where: part.contains))
      let page = Int.random(in: 0..<pageCount)
      #expect(bitmap[page] == model.contains(page))
      let word = bitmap.word(at: page)
      #expect((0..<64).allSatisfy { word >> UInt64($0) & 1 == (model.contains(page + $0) ? 1 : 0) })
    }
    bitmap.removeAll()
    #expect(bitmap.isEmpty && bitmap == DirtyBitmap(pageCount: pageCount))
  }

  @Test("Runs do not touch each other")
  func runs() {
    var bitmap = DirtyBitmap(pageCount: 300)
    bitmap.insert(0..<64)
    bitmap.insert(64..<130)
    bitmap.insert(131)
    bitmap.insert(299)
    #expect(Array(bitmap.ranges) == [0..<130, 131..<132, 299..<300])
    #expect(Array(bitmap.ranges(in: 60..<132)) == [60..<130, 131..<132])
  }
}
