// SPDX-License-Identifier: MIT
//
// The text of wgmma.mma_async for each shape: PTX wants every register of the sums by name. Used by
// wgmma.cuh alone.
//
//   KIMI_SUMS_<n>  operands %0 .. %(n-1)        KIMI_D<n>(i)  d[i] .. d[i + n - 1] as operands
#pragma once

#define KIMI_SUMS_4 "%0, %1, %2, %3"
#define KIMI_SUMS_8 KIMI_SUMS_4 ", %4, %5, %6, %7"
#define KIMI_SUMS_12 KIMI_SUMS_8 ", %8, %9, %10, %11"
#define KIMI_SUMS_16 KIMI_SUMS_12 ", %12, %13, %14, %15"
#define KIMI_SUMS_20 KIMI_SUMS_16 ", %16, %17, %18, %19"
#define KIMI_SUMS_24 KIMI_SUMS_20 ", %20, %21, %22, %23"
#define KIMI_SUMS_28 KIMI_SUMS_24 ", %24, %25, %26, %27"
#define KIMI_SUMS_32 KIMI_SUMS_28 ", %28, %29, %30, %31"
#define KIMI_SUMS_40 KIMI_SUMS_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define KIMI_SUMS_48 KIMI_SUMS_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define KIMI_SUMS_56 KIMI_SUMS_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define KIMI_SUMS_64 KIMI_SUMS_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define KIMI_SUMS_80                         \
  KIMI_SUMS_64                               \
  ", %64, %65, %66, %67, %68, %69, %70, %71" \
  ", %72, %73, %74, %75, %76, %77, %78, %79"
#define KIMI_SUMS_96                         \
  KIMI_SUMS_80                               \
  ", %80, %81, %82, %83, %84, %85, %86, %87" \
  ", %88, %89, %90, %91, %92, %93, %94, %95"
#define KIMI_SUMS_112                            \
  KIMI_SUMS_96                                   \
  ", %96, %97, %98, %99, %100, %101, %102, %103" \
  ", %104, %105, %106, %107, %108, %109, %110, %111"
#define KIMI_SUMS_128                                \
  KIMI_SUMS_112                                      \
  ", %112, %113, %114, %115, %116, %117, %118, %119" \
  ", %120, %121, %122, %123, %124, %125, %126, %127"

#define KIMI_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define KIMI_D8(i) KIMI_D4(i), KIMI_D4(i + 4)
#define KIMI_D12(i) KIMI_D8(i), KIMI_D4(i + 8)
#define KIMI_D16(i) KIMI_D8(i), KIMI_D8(i + 8)
#define KIMI_D20(i) KIMI_D16(i), KIMI_D4(i + 16)
#define KIMI_D24(i) KIMI_D16(i), KIMI_D8(i + 16)
#define KIMI_D28(i) KIMI_D16(i), KIMI_D12(i + 16)
#define KIMI_D32(i) KIMI_D16(i), KIMI_D16(i + 16)
#define KIMI_D40(i) KIMI_D32(i), KIMI_D8(i + 32)
#define KIMI_D48(i) KIMI_D32(i), KIMI_D16(i + 32)
#define KIMI_D56(i) KIMI_D32(i), KIMI_D24(i + 32)
#define KIMI_D64(i) KIMI_D32(i), KIMI_D32(i + 32)
#define KIMI_D80(i) KIMI_D64(i), KIMI_D16(i + 64)
#define KIMI_D96(i) KIMI_D64(i), KIMI_D32(i + 64)
#define KIMI_D112(i) KIMI_D64(i), KIMI_D48(i + 64)
#define KIMI_D128(i) KIMI_D64(i), KIMI_D64(i + 64)

#define KIMI_WGMMA_16(n, type, registers, sums, a_, b_, keep_, ta, tb)                  \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" keep_                               \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type    \
               " {" registers "}, %" a_ ", %" b_ ", p, 1, 1, %" ta ", %" tb ";\n}"      \
               : sums                                                                   \
               : "l"(a), "l"(b), "r"(static_cast<int>(keep)), "n"(kA == Major::kOuter), \
                 "n"(kB == Major::kOuter))

#define KIMI_WGMMA_8(n, registers, sums, a_, b_, keep_)                                     \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" keep_                                   \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k32.f32.e4m3.e4m3 {" registers \
               "}, %" a_ ", %" b_ ", p, 1, 1;\n}"                                           \
               : sums                                                                       \
               : "l"(a), "l"(b), "r"(static_cast<int>(keep)))

// One shape: a_, b_ ... are the numbers of the operands after the sums.
#define KIMI_WGMMA(n, count, a_, b_, keep_, ta, tb)                                         \
  if constexpr (kN == n) {                                                                  \
    if constexpr (std::is_same_v<T, bf16>)                                                  \
      KIMI_WGMMA_16(n, "bf16", KIMI_SUMS_##count, KIMI_D##count(0), a_, b_, keep_, ta, tb); \
    else if constexpr (std::is_same_v<T, fp16>)                                             \
      KIMI_WGMMA_16(n, "f16", KIMI_SUMS_##count, KIMI_D##count(0), a_, b_, keep_, ta, tb);  \
    else                                                                                    \
      KIMI_WGMMA_8(n, KIMI_SUMS_##count, KIMI_D##count(0), a_, b_, keep_);                  \
  }

#define KIMI_WGMMA_EVERY_SHAPE                            \
  KIMI_WGMMA(8, 4, "4", "5", "6", "7", "8")               \
  KIMI_WGMMA(16, 8, "8", "9", "10", "11", "12")           \
  KIMI_WGMMA(24, 12, "12", "13", "14", "15", "16")        \
  KIMI_WGMMA(32, 16, "16", "17", "18", "19", "20")        \
  KIMI_WGMMA(40, 20, "20", "21", "22", "23", "24")        \
  KIMI_WGMMA(48, 24, "24", "25", "26", "27", "28")        \
  KIMI_WGMMA(56, 28, "28", "29", "30", "31", "32")        \
  KIMI_WGMMA(64, 32, "32", "33", "34", "35", "36")        \
  KIMI_WGMMA(80, 40, "40", "41", "42", "43", "44")        \
  KIMI_WGMMA(96, 48, "48", "49", "50", "51", "52")        \
  KIMI_WGMMA(112, 56, "56", "57", "58", "59", "60")       \
  KIMI_WGMMA(128, 64, "64", "65", "66", "67", "68")       \
  KIMI_WGMMA(160, 80, "80", "81", "82", "83", "84")       \
  KIMI_WGMMA(192, 96, "96", "97", "98", "99", "100")      \
  KIMI_WGMMA(224, 112, "112", "113", "114", "115", "116") \
  KIMI_WGMMA(256, 128, "128", "129", "130", "131", "132")
