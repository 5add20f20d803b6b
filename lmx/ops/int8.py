"""draft"""
from __future__ import annotations
import functools, math
import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int, Int8, Int32
from lmx.ops import native

def _rows(arguments: str, kernel_args: str) -> str:
    return f"""
define internal void @chunk(ptr %frame, i64 %begin, i64 %end) {{
entry:
{arguments}
  %N = call i64 @dim(ptr %frame, i64 -1, i64 0)
  %M = call i64 @dim(ptr %frame, i64 -1, i64 1)
  %K = call i64 @dim(ptr %frame, i64 0, i64 1)
  br label %output
output:
  %o = phi i64 [ %begin, %entry ], [ %o.next, %done ]
  br label %four
four:
  %r = phi i64 [ 0, %output ], [ %r.next, %do.four ]
  %r.next = add i64 %r, 4
  %fits = icmp sle i64 %r.next, %N
  br i1 %fits, label %do.four, label %one
do.four:
  call void @tile4({kernel_args}, i64 %K, i64 %M, i64 %r, i64 %o)
  br label %four
one:
  %q = phi i64 [ %r, %four ], [ %q.next, %do.one ]
  %left = icmp slt i64 %q, %N
  br i1 %left, label %do.one, label %done
do.one:
  call void @tile1({kernel_args}, i64 %K, i64 %M, i64 %q, i64 %o)
  %q.next = add i64 %q, 1
  br label %one
done:
  %o.next = add i64 %o, 1
  %more = icmp slt i64 %o.next, %end
  br i1 %more, label %output, label %exit
exit:
  ret void
}}
"""

def _int8_ir():
    args="ptr %x, ptr %w, ptr %y"
    load="""  %x = call ptr @data(ptr %frame, i64 0)
  %w = call ptr @data(ptr %frame, i64 1)
  %y = call ptr @data(ptr %frame, i64 -1)"""
    return """
declare <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16>, <16 x i16>)
declare i32 @llvm.vector.reduce.add.v8i32(<8 x i32>)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
"""+_tile8(4)+_tile8(1)+_rows(load,args)

def _tile8(R):
    rows=range(R); U=2
    L=[f"define internal void @tile{R}(ptr %x, ptr %w, ptr %y, i64 %K, i64 %M, i64 %r, i64 %o) alwaysinline {{","entry:",
       "  %oK = mul i64 %o, %K","  %wo = getelementptr i8, ptr %w, i64 %oK"]
    for r in rows: L+=[f"  %r{r} = add i64 %r, {r}",f"  %rK{r} = mul i64 %r{r}, %K",f"  %x{r} = getelementptr i16, ptr %x, i64 %rK{r}"]
    L+=["  br label %loop","loop:","  %k = phi i64 [ 0, %entry ], [ %k.next, %loop ]"]
    L+=[f"  %s{r}.0 = phi <8 x i32> [ zeroinitializer, %entry ], [ %s{r}.{U}, %loop ]" for r in rows]
    for u in range(U):
        L+=[f"  %k.{u} = add i64 %k, {16*u}",f"  %wp.{u} = getelementptr i8, ptr %wo, i64 %k.{u}"]
        if u==0: L+=["  %ahead = getelementptr i8, ptr %wp.0, i64 1024","  call void @llvm.prefetch.p0(ptr %ahead, i32 0, i32 3, i32 1)"]
        L+=[f"  %wb.{u} = load <16 x i8>, ptr %wp.{u}, align 1",f"  %w.{u} = sext <16 x i8> %wb.{u} to <16 x i16>"]
        for r in rows:
            L+=[f"  %xp{r}.{u} = getelementptr i16, ptr %x{r}, i64 %k.{u}",f"  %xv{r}.{u} = load <16 x i16>, ptr %xp{r}.{u}, align 2",
                f"  %p{r}.{u} = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> %xv{r}.{u}, <16 x i16> %w.{u})",
                f"  %s{r}.{u+1} = add <8 x i32> %s{r}.{u}, %p{r}.{u}"]
    L+=[f"  %k.next = add i64 %k, {16*U}","  %more = icmp ult i64 %k.next, %K","  br i1 %more, label %loop, label %done","done:"]
    for r in rows:
        L+=[f"  %rM{r} = mul i64 %r{r}, %M",f"  %yo{r} = add i64 %rM{r}, %o",f"  %yp{r} = getelementptr i32, ptr %y, i64 %yo{r}",
            f"  %sum{r} = call i32 @llvm.vector.reduce.add.v8i32(<8 x i32> %s{r}.{U})",f"  store i32 %sum{r}, ptr %yp{r}"]
    return "\n".join(L+["  ret void","}",""])

def _int4_ir(G):
    names="ptr %x, ptr %x8, ptr %c, ptr %scale, ptr %y"
    load="\n".join(f"  {n.split()[1]} = call ptr @data(ptr %frame, i64 {i})" for n,i in zip(names.split(", "),(0,1,2,3,-1)))
    return """
declare <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16>, <16 x i16>)
declare <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8>, <32 x i8>)
declare <8 x float> @llvm.fma.v8f32(<8 x float>, <8 x float>, <8 x float>)
declare float @llvm.vector.reduce.fadd.v8f32(float, <8 x float>)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
"""+_tile4(4,G)+_tile4(1,G)+_rows(load,names)

def _tile4(R,G):
    rows=range(R); U=G//32
    conc="<32 x i32> <"+", ".join(f"i32 {i}" for i in range(32))+">"
    fif="<16 x i8> <"+", ".join(["i8 15"]*16)+">"; four="<"+", ".join(["i8 4"]*16)+">"
    ones="<16 x i16> <"+", ".join(["i16 1"]*16)+">"
    z8="<8 x i32> zeroinitializer"
    L=[f"define internal void @tile{R}(ptr %x, ptr %x8, ptr %c, ptr %scale, ptr %y, i64 %K, i64 %M, i64 %r, i64 %o) alwaysinline {{","entry:",
       f"  %groups = udiv i64 %K, {G}","  %half = udiv i64 %K, 2","  %oc = mul i64 %o, %half","  %co = getelementptr i8, ptr %c, i64 %oc",
       "  %os = mul i64 %o, %groups","  %so = getelementptr float, ptr %scale, i64 %os"]
    for r in rows: L+=[f"  %r{r} = add i64 %r, {r}",f"  %rK{r} = mul i64 %r{r}, %K",f"  %x{r} = getelementptr i8, ptr %x, i64 %rK{r}",
                       f"  %rG{r} = mul i64 %r{r}, %groups",f"  %e{r} = getelementptr i32, ptr %x8, i64 %rG{r}"]
    L+=["  br label %loop","loop:","  %g = phi i64 [ 0, %entry ], [ %g.next, %loop ]"]
    L+=[f"  %f{r} = phi <8 x float> [ zeroinitializer, %entry ], [ %f{r}.next, %loop ]" for r in rows]
    L+=[f"  %k = mul i64 %g, {G}",f"  %kc = mul i64 %g, {G//2}"]
    for u in range(U):
        L+=[f"  %k.{u} = add i64 %k, {32*u}",f"  %kc.{u} = add i64 %kc, {16*u}",f"  %cp.{u} = getelementptr i8, ptr %co, i64 %kc.{u}"]
        if u%4==0: L+=[f"  %ahead.{u} = getelementptr i8, ptr %cp.{u}, i64 1024",f"  call void @llvm.prefetch.p0(ptr %ahead.{u}, i32 0, i32 3, i32 1)"]
        L+=[f"  %cb.{u} = load <16 x i8>, ptr %cp.{u}, align 1",f"  %lo.{u} = and <16 x i8> %cb.{u}, {fif[10:]}",f"  %hi.{u} = lshr <16 x i8> %cb.{u}, {four}",
            f"  %c.{u} = shufflevector <16 x i8> %lo.{u}, <16 x i8> %hi.{u}, {conc}"]
        for r in rows:
            L+=[f"  %xp{r}.{u} = getelementptr i8, ptr %x{r}, i64 %k.{u}",f"  %xv{r}.{u} = load <32 x i8>, ptr %xp{r}.{u}, align 1",
                f"  %p{r}.{u} = call <16 x i16> @llvm.x86.avx2.pmadd.ub.sw(<32 x i8> %c.{u}, <32 x i8> %xv{r}.{u})"]
            L+=[f"  %s{r}.{u} = add <16 x i16> %p{r}.{u}, "+("zeroinitializer" if u==0 else f"%s{r}.{u-1}")]
    L+=["  %sp = getelementptr float, ptr %so, i64 %g","  %s1 = load float, ptr %sp","  %s2 = insertelement <8 x float> poison, float %s1, i32 0",
        f"  %sv = shufflevector <8 x float> %s2, <8 x float> poison, {z8}"]
    for r in rows:
        L+=[f"  %i{r} = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> %s{r}.{U-1}, {ones})",
            f"  %ep{r} = getelementptr i32, ptr %e{r}, i64 %g",f"  %e1{r} = load i32, ptr %ep{r}",f"  %e2{r} = insertelement <8 x i32> poison, i32 %e1{r}, i32 0",
            f"  %ev{r} = shufflevector <8 x i32> %e2{r}, <8 x i32> poison, {z8}",f"  %j{r} = sub <8 x i32> %i{r}, %ev{r}",
            f"  %jf{r} = sitofp <8 x i32> %j{r} to <8 x float>",
            f"  %f{r}.next = call <8 x float> @llvm.fma.v8f32(<8 x float> %jf{r}, <8 x float> %sv, <8 x float> %f{r})"]
    L+=["  %g.next = add i64 %g, 1","  %more = icmp ult i64 %g.next, %groups","  br i1 %more, label %loop, label %done","done:"]
    for r in rows:
        L+=[f"  %rM{r} = mul i64 %r{r}, %M",f"  %yo{r} = add i64 %rM{r}, %o",f"  %yp{r} = getelementptr float, ptr %y, i64 %yo{r}",
            f"  %sum{r} = call reassoc float @llvm.vector.reduce.fadd.v8f32(float -0.0, <8 x float> %f{r}.next)",f"  store float %sum{r}, ptr %yp{r}"]
    return "\n".join(L+["  ret void","}",""])

@functools.cache
def t8(): return native.register("lmx_int8_by",_int8_ir())
@functools.cache
def t4(G): return native.register(f"lmx_int4_by_{G}",_int4_ir(G))
def k8(x,w):
    return jax.ffi.ffi_call(t8(),jax.ShapeDtypeStruct((x.shape[0],w.shape[0]),jnp.int32))(x.astype(jnp.int16),w)
def k4(x,codes,scale):
    N,K=x.shape; M,groups=scale.shape; G=K//groups
    e=jnp.sum(x.reshape(N,groups,G).astype(jnp.int32),-1)
    xp=x.reshape(N,K//32,16,2).swapaxes(2,3).reshape(N,K)
    return jax.ffi.ffi_call(t4(G),jax.ShapeDtypeStruct((N,M),jnp.float32))(xp,e,codes,scale)
